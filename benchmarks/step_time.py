"""Training steps against the reference PyTorch I-JEPA: same model, batch, token counts, precision.

  git clone https://github.com/facebookresearch/ijepa REFERENCE
  python benchmarks/step_time.py --reference=REFERENCE [--reference_python=PYTHON] \
    [--device=cuda] [--peers=eager,compile] [--rounds=3 --steps=10] [CONFIG[,KEY=VALUE ...] ...]

Each side runs in a process of its own, on random images that lie on the device already. In a round
all start anew; on a CPU they then take turns, a step or half a second of steps each, so that a
machine's neighbours slow all of them; on a GPU, which can't hold both, one runs after the other.
The reference gets contexts and targets of as many tokens as jepax computes, padding included, so
both do the same work; drawing the masks is part of jepax's step and not of the reference's, which
does it in the loader's workers. PYTHON is an interpreter with torch, this one by default. Runs on
a CPU or on one CUDA GPU. Writes benchmarks/results/step_time.json and .md, step_time_cuda on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from jepax import huge_pages

HERE = pathlib.Path(__file__).parent
_UNROLLED = ",".join(
  f"method.{part}.{choice}"
  for part in ("encoder", "predictor")
  for choice in ("scan=false", "remat=none")
)
CASES = {
  "cpu": (
    "configs/quickstart.py",
    "configs/quickstart.py,method.encoder.activation=gelu,method.predictor.activation=gelu",
    "configs/ijepa_vits.py,batch_size=16,precision=float32",
  ),
  # Batches of the reference's GPUs, or what fits beside it in 80 GB; see results/gpu_program.md.
  "cuda": (
    "configs/ijepa_vitb.py,batch_size=256",
    f"configs/ijepa_vitl.py,batch_size=256,{_UNROLLED}",
    f"configs/ijepa_vith14.py,batch_size=128,{_UNROLLED}",
  ),
}
PEERS = {"cpu": "eager", "cuda": "eager,compile"}
# Of both sides: one kind of device, and one GPU.
ENVIRONMENTS = {
  "cpu": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
  "cuda": {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": "0"},
}
# Dense bfloat16 FLOP/s of one GPU, NVIDIA's data sheets.
PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}


@dataclasses.dataclass(frozen=True)
class Case:
  """What both sides train; counts are of one image. encoder, predictor: sizes by name."""

  spec: str
  batch: int
  size: int
  channels: int
  precision: str
  encoder: dict[str, int]
  predictor: dict[str, int]
  context: int
  targets: int
  target: int
  flops: float  # of matrix products, a step

  @classmethod
  def of(cls, spec: str) -> Case:
    """The case of 'FILE,KEY=VALUE,...'."""
    experiment = load(spec)
    c, method = experiment.config, experiment.method
    encoder, predictor = method.encoder, method.predictor
    masks = method.masks
    names = ("width", "depth", "heads", "mlp_width")
    sizes = {name: getattr(encoder, name) for name in names}
    return cls(
      spec=spec,
      batch=c.batch_size,
      size=c.data.size,
      channels=c.data.channels,
      precision=c.precision,
      encoder=sizes | {"patch": encoder.patch, "mlp_width": encoder.mlp_width or 4 * encoder.width},
      predictor={name: getattr(predictor, name) for name in names[:3]},
      context=masks.context_size,
      targets=masks.targets,
      target=masks.target_size,
      flops=model_flops(spec),
    )


def model_flops(spec: str) -> int:
  """Of the matrix products of one step; what rematerialisation computes again is left out."""
  from jepax import flops
  from jepax.planning import aot

  return flops.count(aot.trace(load(spec, plain=True)).jaxpr)


def load(spec: str, *, plain: bool = False):
  """'FILE,KEY=VALUE,...' -> a run's pieces, for images that nobody reads; plain: without remat."""
  from jepax import config as config_lib
  from jepax import sharding
  from jepax.data.build import Data
  from jepax.experiment import prepare
  from jepax.planning.plan import without_remat

  path, *overrides = spec.split(",")
  config = config_lib.load(str(HERE.parent / path), overrides)
  config = without_remat(config) if plain else config
  rows = config.batch_size // config.accumulate
  sharding.use_all_cores(rows=rows, count=config.mesh.cpu_devices)
  return prepare(config, data=Data.unread(config.data, count=10**6))


def run_jepax(
  spec: str, *, warmup: int, steps: int, turn: Callable[[], None] | None = None
) -> dict:
  """Times the training step of a config, as `jepax.main` runs it; calls `turn` before each step."""
  import jax

  experiment = load(spec)
  c = experiment.config
  shape = (c.batch_size, c.data.size, c.data.size, c.data.channels)
  images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
  batch = {"image": jax.device_put(images, experiment.batch_sharding)}
  state = experiment.initial_state()
  jax.block_until_ready(state)
  start = time.perf_counter()
  state, metrics = experiment.train_step(state, batch)
  float(metrics["train/loss"])
  first = time.perf_counter() - start
  seconds = []
  for i in range(warmup + steps):
    if turn and i >= warmup:
      turn()
    start = time.perf_counter()
    state, metrics = experiment.train_step(state, batch)
    float(metrics["train/loss"])
    if i >= warmup:
      seconds.append(time.perf_counter() - start)
  device = jax.devices()[0]
  if device.platform == "cpu":
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  else:
    peak = device.memory_stats()["peak_bytes_in_use"]
  return {
    "seconds": seconds,
    "first_step": first,
    "peak_bytes": peak,
    "device": f"{device.device_kind}, {jax.device_count()} device(s)",
    "version": f"jax {jax.__version__}",
  }


class Turns:
  """In a worker: waits until it is its turn, which lasts half a second or a step."""

  def __init__(self):
    self.end = 0.0

  def __call__(self) -> None:
    if time.perf_counter() >= self.end:
      print("ready", flush=True)
      sys.stdin.readline()
      self.end = time.perf_counter() + 0.5


class Side:
  """A command that times `steps` steps, see `Turns`, and prints JSON as its last line."""

  def __init__(self, name: str, command: list[str], environment: dict[str, str]):
    self.name, self.command, self.environment = name, command, environment
    self.rounds: list[dict] = []

  def start(self) -> None:
    """Starts the process and returns when it is warm."""
    pipe = subprocess.PIPE
    self.process = subprocess.Popen(
      self.command, env=self.environment, stdin=pipe, stdout=pipe, text=True, cwd=HERE.parent
    )
    self._read()

  def turn(self) -> bool:
    """Lets it go on until its turn ends; whether steps are left."""
    print(file=self.process.stdin, flush=True)
    return self._read()

  def _read(self) -> bool:
    for line in self.process.stdout:
      if line == "ready\n":
        return True
      last = line
    if self.process.wait():
      raise SystemExit(f"{self.name} failed: {' '.join(self.command)}")
    self.rounds.append(json.loads(last))
    return False

  def row(self, case: Case, ours: float | None = None) -> dict:
    """Median over the rounds; `ours` is jepax's rate, which the ratio is of."""
    seconds = statistics.median(statistics.median(r["seconds"]) for r in self.rounds)
    row = {
      "side": self.name,
      "images_per_second": round(case.batch / seconds, 2),
      "milliseconds": round(1000 * seconds, 2),
      "tflops_per_second": round(case.flops / seconds / 1e12, 4),
      "first_step_seconds": round(statistics.median(r["first_step"] for r in self.rounds), 1),
      "peak_gib": round(max(r["peak_bytes"] for r in self.rounds) / 2**30, 3),
      "device": self.rounds[0]["device"],
      "version": self.rounds[0]["version"],
    }
    chip = row["device"].split(",")[0]
    if chip in PEAKS and case.precision == "bfloat16":
      row["mfu"] = round(case.flops / seconds / PEAKS[chip], 3)
    if ours is not None:
      row["jepax_is_faster_by"] = round(ours * seconds / case.batch, 3)
    return row


def sides(
  case: Case, options: argparse.Namespace, environment: dict[str, str], added: dict[str, str]
) -> list[Side]:
  """jepax first, with what is added to its environment, then its peers."""
  counts = [f"--warmup={options.warmup}", f"--steps={options.steps}"]
  worker = [sys.executable, str(HERE / "step_time.py"), f"--worker={case.spec}", *counts]
  found = [Side("jepax", worker, environment | added)]
  for peer in options.peers.split(","):
    settings = dataclasses.asdict(case) | {
      "reference": str(options.reference.resolve()),
      "compile": peer == "compile",
      "warmup": options.warmup,
      "steps": options.steps,
    }
    script = str(HERE / "step_time_reference.py")
    command = [options.reference_python, script, json.dumps(settings)]
    found.append(Side(f"reference, {peer}", command, environment))
  return found


def compare(
  case: Case, options: argparse.Namespace, environment: dict[str, str], added: dict[str, str]
) -> list[dict]:
  """One row a side."""
  found = sides(case, options, environment, added)
  for _ in range(options.rounds):
    for group in [found] if options.device == "cpu" else [[side] for side in found]:
      for side in group:
        side.start()
      left = group
      while left:
        left = [side for side in left if side.turn()]
  ours = found[0].row(case)
  return [ours, *(side.row(case, ours["images_per_second"]) for side in found[1:])]


def table(results: list[dict]) -> str:
  """Markdown: a heading and a table a case."""
  parts = []
  for result in results:
    case, rows = result["case"], result["rows"]
    tokens = f"{case['context']} context tokens, {case['targets']} targets of {case['target']}"
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
      lines.append(f"| {' | '.join(str(row[n]) if n in row else '' for n in names)} |")
    head = f"## {case['spec']}\n\nbatch {case['batch']}, {case['precision']}, {tokens}"
    work = f"{case['flops'] / 1e9:.2f} GFLOP of matrix products a step"
    parts.append(f"{head}, {work}\n\n" + "\n".join(lines))
  return "\n\n".join(parts)


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("cases", nargs="*", help="CONFIG[,KEY=VALUE ...]; those of the device")
  parser.add_argument("--device", choices=list(CASES), default=device(), help="cuda where there is")
  parser.add_argument("--reference", type=pathlib.Path, help="checkout of the reference")
  parser.add_argument("--reference_python", default=sys.executable, help="interpreter with torch")
  parser.add_argument("--peers", help="eager, compile, or both by a comma (default on cuda)")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--worker", help=argparse.SUPPRESS)
  options = parser.parse_args()
  check_device(options.device)
  options.cases = options.cases or CASES[options.device]
  options.peers = options.peers or PEERS[options.device]
  return options


def device() -> str:
  """What this machine has, without loading what would hold its memory."""
  driver = pathlib.Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi")
  return "cuda" if driver else "cpu"


def check_device(name: str) -> None:
  """Ends the program where this machine lacks the device."""
  if name == "cuda" and device() == "cpu":
    raise SystemExit("--device=cuda: this machine has no NVIDIA driver; allowed here is cpu")


def main() -> None:
  options = parse()
  if options.worker:
    counts = dict(warmup=options.warmup, steps=options.steps)
    print(json.dumps(run_jepax(options.worker, **counts, turn=Turns())))
    return
  if options.reference is None or not (options.reference / "src" / "train.py").is_file():
    raise SystemExit("--reference must be a checkout of facebookresearch/ijepa")
  environment = ENVIRONMENTS[options.device] | dict(os.environ)
  os.environ["JAX_PLATFORMS"] = environment["JAX_PLATFORMS"]
  added = huge_pages.environment()  # as jepax.main starts with; the reference is slower with it
  os.environ["JAX_PLATFORMS"] = "cpu"  # this process only looks at shapes
  from jepax.versions import environment as versions

  results = []
  for spec in options.cases:
    case = Case.of(spec)
    rows = compare(case, options, environment, added)
    results.append({"case": dataclasses.asdict(case), "rows": rows})
    print(table(results[-1:]), flush=True)
  # Where things lie on this machine is nobody's business.
  paths = {"--reference": "REFERENCE", "--reference_python": "PYTHON"}
  words = [w.partition("=")[0] for w in sys.argv[1:]]
  shown = [f"{n}={paths[n]}" if n in paths else w for n, w in zip(words, sys.argv[1:], strict=True)]
  command = " ".join(["python", "benchmarks/step_time.py", *shown])
  notes = {"date": datetime.date.today().isoformat(), "command": command, **versions()}
  notes |= {"devices": results[0]["rows"][0]["device"]}  # this process looked at shapes alone
  notes |= {f"{name}, jepax alone": value for name, value in added.items()}
  name = "step_time" if options.device == "cpu" else f"step_time_{options.device}"
  write(name, "A training step beside the reference's", table(results), results, notes)


def write(name: str, title: str, text: str, results: list[dict], notes: dict[str, str]) -> None:
  """benchmarks/results/NAME.json and NAME.md: the table `text` under its title, notes below."""
  path = HERE / "results" / f"{name}.json"
  path.write_text(json.dumps({"notes": notes, "results": results}, indent=1) + "\n")
  below = "\n".join(f"- {key}: {value}" for key, value in notes.items())
  path.with_suffix(".md").write_text("\n\n".join([f"# {title}", text, below]) + "\n")


if __name__ == "__main__":
  main()
