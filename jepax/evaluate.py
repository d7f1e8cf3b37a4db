"""python -m jepax.evaluate --run=WORKDIR|--weights=PATH [--evals=knn,linear] [--data.KEY=VALUE ...]

Frozen encoders through named protocols, each number beside its controls: the same encoder at random
initialisation and the pixels themselves. Writes results.json and report.html.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from jepax import cli

RUN = flags.DEFINE_string("run", None, "Workdir of a run: its newest checkpoint is evaluated.")
WEIGHTS = flags.DEFINE_string(
  "weights", None, "Weights: a jepax or Hugging Face folder, or a .pth.tar of I-JEPA."
)
EVALS = flags.DEFINE_list("evals", ["knn", "linear"], "Protocols by name; 'help' lists them.")
SPLIT = flags.DEFINE_enum(
  "split",
  "validation",
  ("validation", "test"),
  "What is scored: held-out training images, or the test split.",
)
SEEDS = flags.DEFINE_integer("seeds", 1, "Repetitions with other splits and probe seeds.", 1)
LIMIT = flags.DEFINE_integer("limit", 100_000, "Training images at most.", 1)
BATCH = flags.DEFINE_integer("batch_size", 256, "Images a forward pass.", 1)
POSITIONS = flags.DEFINE_enum(
  "positions", None, ("interpolate", "recompute"), "How position tables meet another image size."
)
SIZE = flags.DEFINE_integer("size", None, "Image side for --weights, pixels; theirs by default.", 1)
OUT = flags.DEFINE_string("out", None, "Folder of the results; WORKDIR/evaluation by default.")


def main(argv: list[str]) -> None:
  """Loads encoders and data, runs the protocols, writes and prints what they found."""
  command = shlex.join(["python", "-m", "jepax.evaluate", *sys.argv[1:]])
  # JAX and the rest load here, after the flags were found good.
  from jepax.evals import suite

  if EVALS.value == ["help"]:
    print(describe())
    return
  with cli.errors(ValueError, OSError):
    results, out = run(argv[1:], command)
  print(suite.table(results["protocols"]))
  print(f"\nreport: {out / 'report.html'}")


def describe() -> str:
  """One line a protocol."""
  from jepax.evals.registry import PROTOCOLS

  return "\n".join(
    f"{name:16}{type(p).__doc__.splitlines()[0]} ({p.source})" for name, p in PROTOCOLS.items()
  )


def run(overrides: list[str], command: str) -> tuple[dict[str, Any], Path]:
  """The evaluation that the flags describe; returns what results.json holds, and its folder."""
  from jepax.data.build import build
  from jepax.evals import show, suite
  from jepax.evals.registry import PROTOCOLS
  from jepax.metrics import write_json
  from jepax.names import one_of

  quiet = not flags.FLAGS["verbosity"].present
  if quiet:  # the libraries that open weights and data warn of what is no fault
    logging.set_verbosity(logging.ERROR)
  source = _source()
  if not EVALS.value:
    raise ValueError("--evals names no protocol; --evals=help lists them")
  chosen = {name: PROTOCOLS[one_of(name, PROTOCOLS, where="--evals")] for name in EVALS.value}
  out = Path(OUT.value or (Path(source) / "evaluation" if RUN.value else "evaluation"))
  data_config, config = _data_config(overrides)
  encoders = _encoders(source)
  suite.check(encoders, chosen)
  facts = {
    "split": SPLIT.value,
    "seeds": SEEDS.value,
    "limit": LIMIT.value,
    "weights": {e.name: {"origin": e.origin, "sha256": e.sha256()} for e in encoders},
    "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
  }
  earlier = _earlier(out, facts)
  data = build(data_config)
  out.mkdir(parents=True, exist_ok=True)  # what can't be written should not take hours to say so
  if quiet:  # unreadable images are named
    logging.set_verbosity(logging.WARNING)
  protocols = suite.evaluate(
    [*encoders, encoders[0].random()],
    data,
    chosen,
    split=SPLIT.value,
    seeds=SEEDS.value,
    limit=LIMIT.value,
    batch_size=BATCH.value,
  )
  protocols = earlier | protocols
  results = {
    **suite.headline(protocols),
    "protocols": protocols,
    "evaluation": {**facts, "command": command},
  }
  write_json(out / "results.json", results)  # first: pictures may fail, numbers must not be lost
  _report(out, results, show.gallery(encoders[0], data, batch_size=BATCH.value), command, config)
  return results, out


def _earlier(out: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
  """Protocols that an earlier evaluation of the same thing left; these are kept and added to.

  Raises:
    ValueError: the folder holds results of something else.
  """
  if out.exists() and not out.is_dir():
    raise ValueError(f"--out={out} is a file, and results are a folder")
  path = out / "results.json"
  if not path.exists():
    return {}
  found = json.loads(path.read_text())
  if "evaluation" not in found:
    raise ValueError(f"{path} is of a run, not of an evaluation; give another --out")
  before = found["evaluation"]
  other = [name for name in facts if before[name] != facts[name]]
  if other:
    raise ValueError(
      f"{path} holds results of another evaluation, which differs in {other}; give another --out"
    )
  return found["protocols"]


def _source() -> str:
  """The one of --run and --weights that was given."""
  if bool(RUN.value) == bool(WEIGHTS.value):
    raise ValueError("give --run=WORKDIR or --weights=PATH, one of them")
  return RUN.value or WEIGHTS.value


def _data_config(overrides: list[str]) -> tuple[Any, str]:
  """The data section, that of the run if there is one, and the whole config as text."""
  from ml_collections import ConfigDict

  from jepax import config as config_lib

  config = config_lib.base()
  if RUN.value:
    path = Path(RUN.value) / "config.json"
    if not path.is_file():
      raise ValueError(f"{RUN.value} is no workdir of a run: it has no config.json")
    saved = json.loads(path.read_text())
    _check_run(saved, own_data=any(a.startswith("data.source=") for a in overrides))
    config.data.update(saved["data"])
  for assignment in overrides:
    try:
      config_lib.override(config, assignment)
    except ValueError as error:  # the flag is --data.KEY here
      raise ValueError(str(error).replace("--config.", "--")) from error
  text = path.read_text() if RUN.value else ""
  return ConfigDict(config.data), text + json.dumps(config.data.to_dict(), indent=2)


def _check_run(saved: Mapping[str, Any], *, own_data: bool) -> None:
  """Raises ValueError where a run's method, its data or its early stop forbid this evaluation."""
  if "given_method" in saved:
    raise ValueError(
      f"this run trained a method given in Python, {saved['given_method']['type']}, which its "
      "config can't bring back: call jepax.pretrained.load(workdir, method=...), and "
      "jepax.evals.suite.evaluate with what it returns"
    )
  if "given_data" in saved and not own_data:
    raise ValueError(
      "this run was trained on arrays given in Python, which its config can't bring back: name "
      "labelled images by --data.source=..., or call jepax.evals.suite.evaluate with the arrays"
    )
  metric = saved["stop"]["metric"]
  if SPLIT.value == "test" and metric.startswith(("knn/", "linear/", "eval/")):
    raise ValueError(
      f"this run stopped early on {metric!r}, measured on its held-out split, so that split chose "
      "the checkpoint and can't judge it: use --split=validation, or stop on a training metric"
    )


def _encoders(source: str) -> list[Any]:
  """An encoder for each set of weights that the source holds, the one that counts first."""
  from jepax.convert import source as weights_source

  weights = weights_source.read(source).at(size=SIZE.value, positions=POSITIONS.value)
  return [weights.encoder(branch) for branch in weights.branches]


def _report(out: Path, results: Mapping[str, Any], pictures: Any, command: str, config: str):
  from jepax import report
  from jepax.versions import environment

  page = report.Report(
    title=f"Evaluation of {RUN.value or WEIGHTS.value}",
    command=command,
    config_text=config,
    environment=environment(),
    results=results,
    pictures=pictures,
  )
  report.write(out / "report.html", page)


if __name__ == "__main__":
  app.run(main, flags_parser=functools.partial(cli.parse, prefix="--data."))
