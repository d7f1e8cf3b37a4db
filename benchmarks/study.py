"""Methods on one data set at equal compute, seeds and all: trains, evaluates, writes one table.

  python benchmarks/study.py --out=runs/study [--teraflops=15 --seeds=3 --split=test]

Every method gets the steps that the same number of floating-point operations buys, as XLA counts
them in its compiled training step, on the encoder and the data of its config. Runs and evaluations
that are done already are kept, so a study that was stopped goes on. Writes study.json and study.md
into benchmarks/results.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import pathlib

import jax
import numpy as np

from jepax import config as config_lib
from jepax import fit
from jepax.convert import source
from jepax.data.build import build
from jepax.evals import suite
from jepax.evals.registry import PROTOCOLS
from jepax.experiment import prepare
from jepax.names import one_of
from jepax.report.protocols import cell
from jepax.versions import environment

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = {
  "I-JEPA": "quickstart",
  "MAE": "mae_fashion_mnist",
  "VICReg": "vicreg_fashion_mnist",
}
EVALS = (
  *("knn", "knn_euclidean", "knn_spatial", "linear", "linear_last4", "linear_spatial"),
  *("linear_sgd", "low_shot_1pct", "attentive", "geometry"),
)


@dataclasses.dataclass(frozen=True)
class Study:
  """What is compared. out: where the runs lie. teraflops: 1e12 operations of training a run."""

  out: pathlib.Path
  teraflops: float
  seeds: int
  split: str
  evals: tuple[str, ...]
  overrides: tuple[str, ...]

  def train(self, method: str, seed: int) -> pathlib.Path:
    """Trains one method with one seed, from where it was left; returns its workdir."""
    workdir = self.out / f"{CONFIGS[method]}-{seed}"
    if (workdir / "results.json").exists():
      return workdir  # of this budget: `claim` refuses a folder of another
    spec = str(ROOT / "configs" / f"{CONFIGS[method]}.py")
    settings = (f"seed={seed}", "eval.every=20%", "checkpoint.keep=1", *self.overrides)
    config = config_lib.load(spec, settings)
    experiment = prepare(config)
    steps = round(1e12 * self.teraflops / flops(experiment))
    print(f"{method}, seed {seed}: {steps} steps of {config.batch_size} images", flush=True)
    config = config_lib.load(spec, (*settings, f"total={steps} steps"))
    found = fit.run(config, workdir)
    if found["train"]["status"] != "finished":
      raise SystemExit(f"stopped in {workdir}; the same command goes on from there")
    return workdir

  def claim(self) -> None:
    """Makes the folder this study's own; one that holds another budget or data is refused."""
    path = self.out / "study.json"
    own = {"teraflops": self.teraflops, "overrides": list(self.overrides)}
    self.out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      path.write_text(json.dumps(own))
    found = json.loads(path.read_text())
    if found != own:
      raise SystemExit(f"{self.out} holds the runs of {found}, not of {own}; give another --out")

  def score(self, workdir: pathlib.Path, seed: int, control: bool) -> dict:
    """The protocols' results for a run's encoders; with the random control where it is asked."""
    key = hashlib.sha256(json.dumps([self.split, self.evals, control]).encode()).hexdigest()[:8]
    path = workdir / f"study-{key}.json"
    if path.exists():
      return json.loads(path.read_text())
    config = json.loads((workdir / "config.json").read_text())
    section = config_lib.base().data
    section.update({k: tuple(v) if isinstance(v, list) else v for k, v in config["data"].items()})
    weights = source.read(workdir)
    first = weights.encoder()
    encoders = [first, first.random(seed)] if control else [first]
    protocols = {name: PROTOCOLS[name] for name in self.evals}
    found = suite.evaluate(encoders, build(section), protocols, split=self.split)
    found = {"protocols": found, "train": json.loads((workdir / "results.json").read_text())}
    path.write_text(json.dumps(found))
    return found

  def run(self) -> dict[str, dict[str, list[dict[str, float]]]]:
    """protocol -> method or control -> a dict of numbers a seed."""
    self.claim()
    rows: dict[str, dict[str, list]] = {name: {} for name in self.evals}
    seconds: dict[str, list[float]] = {}
    for seed in range(self.seeds):
      for i, method in enumerate(CONFIGS):
        workdir = self.train(method, seed)
        found = self.score(workdir, seed, control=i == 0)
        seconds.setdefault(method, []).append(found["train"]["train"]["seconds"])
        for protocol, result in found["protocols"].items():
          for subject, numbers in result["scores"].items():
            if subject == "pixels" and (i or seed):
              continue  # the same in every run
            name = subject if subject in ("pixels", "random_init") else method
            values = {number: value["mean"] for number, value in numbers.items()}
            rows[protocol].setdefault(name, []).append(values)
    return {"rows": rows, "train_seconds": seconds}


def flops(experiment) -> float:
  """Floating-point operations of one training step, as XLA counts them before it optimises."""
  c = experiment.config
  shape = (c.batch_size, c.data.size, c.data.size, c.data.channels)
  batch = {"image": jax.ShapeDtypeStruct(shape, np.uint8)}
  with jax.set_mesh(experiment.mesh):
    step = experiment.train_step.__wrapped__
    return step.lower(experiment.abstract_state, batch).cost_analysis()["flops"]


def table(found: dict) -> str:
  """Markdown: one row a number, one column a method, mean and spread over seeds."""
  names = list(dict.fromkeys(n for rows in found["rows"].values() for n in rows))
  lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
  for protocol, rows in found["rows"].items():
    scores = {name: _spread(values) for name, values in rows.items()}
    for number in dict.fromkeys(n for numbers in scores.values() for n in numbers):
      cells = (cell(scores, name, number) for name in names)
      lines.append(f"| {protocol} {number} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _spread(values: list[dict[str, float]]) -> dict[str, dict]:
  """Mean, standard deviation and single values of each number."""
  out = {}
  for number in values[0]:
    seeds = [row[number] for row in values if number in row]
    std = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
    out[number] = {"mean": float(np.mean(seeds)), "std": std, "seeds": seeds}
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
  parser.add_argument("--teraflops", type=float, default=15.0, help="1e12 operations a run")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--split", default="test")
  parser.add_argument("--evals", default=",".join(EVALS))
  parser.add_argument("overrides", nargs="*", help="KEY=VALUE of every config")
  options = vars(parser.parse_args())
  evals = tuple(one_of(name, PROTOCOLS, where="--evals") for name in options["evals"].split(","))
  overrides = tuple(options["overrides"])
  study = Study(**options | {"evals": evals, "overrides": overrides})
  found = study.run()
  notes = {
    "teraflops": study.teraflops,
    "seeds": study.seeds,
    "split": study.split,
    "overrides": list(overrides),
    "date": datetime.date.today().isoformat(),
    **environment(),
  }
  results = ROOT / "benchmarks" / "results"
  (results / "study.json").write_text(json.dumps({"notes": notes, **found}, indent=1) + "\n")
  text = [
    "# Methods at equal compute",
    f"{study.teraflops:g} TFLOP of training a run, {study.seeds} seed(s), scored on {study.split}.",
    table(found),
    "\n".join(f"- {name}: {value}" for name, value in notes.items()),
  ]
  (results / "study.md").write_text("\n\n".join(text) + "\n")
  print(text[2])


if __name__ == "__main__":
  main()
