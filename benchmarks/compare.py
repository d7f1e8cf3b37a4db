"""Methods on one data set with one encoder at equal compute: trains, evaluates, makes one table.

  python benchmarks/compare.py --out=runs/compare [--methods=ijepa,mae,...] \
    [--teraflops=2 --seeds=3 --split=test --evals=knn,linear --limit=100000 --name=compare] \
    [KEY=VALUE ...]

METHOD is short for configs/METHOD_fashion_mnist.py; any config's name will do. Each gets the steps
that the same number of floating-point operations buys, as `jepax.flops` counts them in its training
step; the encoder must be the same in all. KEY=VALUE goes to every config. Runs and scores that are
there already are kept, so a comparison that was stopped goes on. Writes NAME.md, .html, .csv and
.json into benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import hashlib
import html
import json
import math
import pathlib
import re
import shlex
import sys

import numpy as np
from absl import logging

from jepax import config as config_lib
from jepax import fit, flops, huge_pages, sharding
from jepax.convert import source
from jepax.data.build import build
from jepax.evals import suite
from jepax.evals.registry import PROTOCOLS
from jepax.experiment import prepare
from jepax.metrics import write_json
from jepax.names import one_of
from jepax.planning import aot
from jepax.planning.plan import without_remat
from jepax.report.parts import name_of
from jepax.report.protocols import cell
from jepax.report.style import CSS
from jepax.versions import environment

ROOT = pathlib.Path(__file__).parent.parent
SUFFIX = "_fashion_mnist"
FOUND = (p.stem.removesuffix(SUFFIX) for p in (ROOT / "configs").glob(f"*{SUFFIX}.py"))
METHODS = sorted(FOUND, key=lambda name: (name != "ijepa", name))  # times are beside the first's
EVALS = (
  *("knn", "knn_euclidean", "knn_spatial", "linear", "linear_last4", "linear_spatial"),
  *("linear_sgd", "low_shot_1pct", "attentive", "geometry"),
)
CONTROLS = ("random_init", "pixels")
# {row: {number: {"mean", "std", "seeds"}}}; a number is 'PROTOCOL MEASURE'.
Table = dict[str, dict[str, dict]]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What is compared. out: where the runs lie. teraflops: 1e12 operations of training a run."""

  out: pathlib.Path
  methods: tuple[str, ...]
  teraflops: float
  seeds: int
  split: str
  evals: tuple[str, ...]
  limit: int
  overrides: tuple[str, ...]

  def run(self) -> Table:
    """One row a method and a control, seeds joined."""
    self._claim()
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(self.seeds):
      for i, method in enumerate(self.methods):
        workdir = self._train(method, seed)
        scores = self._score(workdir, seed, control=i == 0)
        for subject, numbers in scores.items():
          row = subject if subject in CONTROLS else method
          found.setdefault(row, []).append(numbers | (self._cost(workdir) if row == method else {}))
    for i, first in enumerate(found[self.methods[0]]):
      for method in self.methods:
        numbers = found[method][i]
        numbers["time beside the first's"] = numbers["train seconds"] / first["train seconds"]
    return {row: _spread(found[row]) for row in (*self.methods, *CONTROLS)}

  def check(self) -> None:
    """Raises ValueError or SystemExit for what would fail late, or make a table that misleads."""
    if self.seeds < 1 or self.limit < 1 or not 0 < self.teraflops < math.inf:
      raise ValueError("--seeds and --limit must be at least 1, and --teraflops above 0")
    for option, names in (("--methods", self.methods), ("--evals", self.evals)):
      if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{option} must be names by commas, each once; found {','.join(names)!r}")
    for name in self.evals:
      one_of(name, PROTOCOLS, where="--evals")
    taken = [o for o in self.overrides if o.split("=")[0] in ("seed", "total", "checkpoint.keep")]
    if taken:
      raise ValueError(f"{taken} are the comparison's own to set; see --seeds and --teraflops")
    self.check_encoders()

  def check_encoders(self) -> None:
    """Raises SystemExit unless all methods train the same encoder."""
    sizes = {}
    for method in self.methods:
      encoder = prepare(self._config(method, seed=0)).method.encoder
      kind = type(encoder).__name__
      names = ("width", "depth", "depths", "heads", "patch")
      sizes[method] = kind, *(f"{n}={getattr(encoder, n)}" for n in names if hasattr(encoder, n))
    if len(set(sizes.values())) > 1:
      lines = "".join(f"\n  {method}: {' '.join(size)}" for method, size in sizes.items())
      raise SystemExit(f"the methods must train one encoder, and theirs differ:{lines}")

  def _claim(self) -> None:
    """Makes the folder this comparison's own; one that holds another budget or data is refused."""
    path = self.out / "comparison.json"
    own = {"teraflops": self.teraflops, "overrides": list(self.overrides)}
    self.out.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      write_json(path, own)
    found = json.loads(path.read_text())
    if found != own:
      raise SystemExit(f"{self.out} holds the runs of {found}, not of {own}; give another --out")

  def _config(self, method: str, *, seed: int, total: str | None = None):
    path = ROOT / "configs" / f"{method}{SUFFIX}.py"
    path = path if path.exists() else ROOT / "configs" / f"{method}.py"
    settings = [f"seed={seed}", "checkpoint.keep=1", *self.overrides]
    return config_lib.load(str(path), settings + [f"total={total}"] * (total is not None))

  def _train(self, method: str, seed: int) -> pathlib.Path:
    """Trains one method with one seed, from where it was left; returns its workdir."""
    workdir = self.out / f"{method}-{seed}"
    if (workdir / "results.json").exists():
      return workdir  # of this budget: `_claim` refuses a folder of another
    experiment = prepare(without_remat(self._config(method, seed=seed)))
    each = flops.count(aot.trace(experiment).jaxpr)
    steps = round(1e12 * self.teraflops / each)
    if steps < 3:  # the first is compilation and is not timed
      raise SystemExit(
        f"--teraflops={self.teraflops:g} is {steps} steps of {method}, of {each / 1e9:.3g} GFLOP "
        "each; give more"
      )
    config = self._config(method, seed=seed, total=f"{steps} steps")
    print(f"{method}, seed {seed}: {steps} steps of {config.batch_size} images", flush=True)
    found = fit.run(config, workdir)
    if found["train"]["status"] != "finished":
      raise SystemExit(f"stopped in {workdir}; the same command goes on from there")
    return workdir

  def _score(self, workdir: pathlib.Path, seed: int, *, control: bool) -> dict[str, dict]:
    """subject -> 'PROTOCOL MEASURE' -> value, of the branch that the method evaluates first."""
    key = json.dumps([self.split, self.evals, self.limit, control])
    key = hashlib.sha256(key.encode()).hexdigest()[:8]
    path = workdir / f"scores-{key}.json"
    if path.exists():
      return json.loads(path.read_text())
    config = json.loads((workdir / "config.json").read_text())
    section = config_lib.base().data
    section.update({k: tuple(v) if isinstance(v, list) else v for k, v in config["data"].items()})
    first = source.read(workdir).encoder()
    encoders = [first, first.random(seed)] if control else [first]
    protocols = {name: PROTOCOLS[name] for name in self.evals}
    pixels = control and seed == 0  # the same in every run
    options = dict(split=self.split, limit=self.limit, pixels=pixels)
    found = suite.evaluate(encoders, build(section), protocols, **options)
    scores: dict[str, dict] = {}
    for protocol, result in found.items():
      for subject, numbers in result["scores"].items():
        values = {f"{protocol} {number}": value["mean"] for number, value in numbers.items()}
        scores.setdefault(subject, {}).update(values)
    write_json(path, scores)
    return scores

  def _cost(self, workdir: pathlib.Path) -> dict[str, float]:
    results = json.loads((workdir / "results.json").read_text())
    train = {f"train {name}": results["train"][name] for name in ("steps", "seconds")}
    return train | {"collapse alarms": len(results["alarms"])}


def _spread(rows: list[dict[str, float]]) -> dict[str, dict]:
  """Mean, standard deviation over seeds and single values of each number."""
  out = {}
  for number in dict.fromkeys(n for row in rows for n in row):
    seeds = [row[number] for row in rows if number in row]
    std = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
    out[number] = {"mean": float(np.mean(seeds)), "std": std, "seeds": seeds}
  return out


def columns(table: Table) -> list[str]:
  """Accuracies and what they cost; the other numbers are in the CSV and the JSON."""
  numbers = dict.fromkeys(n for row in table.values() for n in row)
  return [n for n in numbers if n.endswith((" accuracy", " steps", " first's", " alarms"))]


def cells(table: Table, row: str) -> list[str]:
  """The row's cells, as text."""
  out = []
  for column in columns(table):
    scores = {row: {column.split()[-1]: table[row][column]} if column in table[row] else {}}
    out.append(cell(scores, row, column.split()[-1]))
  return out


def heading(column: str) -> str:
  """'knn accuracy' -> 'knn'."""
  return column.removesuffix(" accuracy").replace("_", " ")


def markdown(table: Table) -> str:
  """One row a method, one column an accuracy."""
  heads = [heading(column) for column in columns(table)]
  lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
  lines += [f"| {name_of(row)} | {' | '.join(cells(table, row))} |" for row in table]
  return "\n".join(lines)


def page(title: str, text: str, table: Table, notes: dict) -> str:
  """The table as a page of its own, in the style of the reports."""
  heads = "".join(f"<th>{html.escape(heading(column))}</th>" for column in columns(table))
  rows = "".join(
    f"<tr><td>{name_of(row)}</td>" + "".join(f"<td>{c}</td>" for c in cells(table, row)) + "</tr>"
    for row in table
  )
  facts = "".join(
    f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in notes.items()
  )
  return (
    f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    f'<meta name="viewport" content="width=device-width"><style>{CSS}</style>'
    f'<header><h1>{html.escape(title)}</h1><p class="lede">{html.escape(text)}</p></header>'
    f'<main><div class="scroll"><table><thead><tr><th>method</th>{heads}</tr></thead>'
    f"<tbody>{rows}</tbody></table></div><dl>{facts}</dl></main></html>\n"
  )


def write(path: pathlib.Path, table: Table, text: str, notes: dict) -> None:
  """NAME.json, .csv (a line a seed of a number), .md and .html beside one another."""
  title = "Methods at equal compute"
  found = {"notes": notes, "table": table}
  path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
  with path.with_suffix(".csv").open("w", newline="") as file:
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(("method", "number", "seed", "value"))
    for row, numbers in table.items():
      for number, value in numbers.items():
        lines.writerows((row, number, i, v) for i, v in enumerate(value["seeds"]))
  facts = "\n".join(f"- {name}: {value}" for name, value in notes.items())
  parts = (f"# {title}", text, markdown(table), facts)
  path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
  path.with_suffix(".html").write_text(page(title, text, table, notes))


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
  parser.add_argument("--methods", default=",".join(METHODS), help="by commas")
  parser.add_argument("--teraflops", type=float, default=2.0, help="1e12 operations a run")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--split", default="test", choices=suite.SPLITS)
  parser.add_argument("--evals", default=",".join(EVALS), help="protocols, by commas")
  parser.add_argument("--limit", type=int, default=100_000, help="training images of the probes")
  parser.add_argument("--name", default="compare", help="of the files in benchmarks/results")
  parser.add_argument("overrides", nargs="*", help="KEY=VALUE of every config")
  return parser.parse_args()


def main() -> None:
  options = vars(parse())
  name = options.pop("name")
  evals = tuple(options["evals"].split(","))
  lists = dict(methods=tuple(options["methods"].split(",")), overrides=tuple(options["overrides"]))
  study = Comparison(**options | lists | {"evals": evals})
  if not re.fullmatch(r"[\w-]+", name):
    raise SystemExit(f"--name={name!r} must be letters, digits, '-' and '_': it names files")
  logging.set_verbosity(logging.ERROR)  # of folders that hold finished runs
  sharding.use_all_cores(rows=32)
  try:
    study.check()
    table = study.run()
  except (ValueError, OSError) as error:
    raise SystemExit(f"error: {error}") from error
  text = (
    f"{study.teraflops:g} TFLOP of training a run, {study.seeds} seed(s), mean ± standard "
    f"deviation, scored on the {study.split} split."
  )
  told = [word for word in sys.argv[1:] if not word.startswith("--out=")]
  notes = {
    "overrides": " ".join(study.overrides) or "none",
    "command": f"python benchmarks/compare.py --out=RUNS {shlex.join(told)}",
    "date": datetime.date.today().isoformat(),
    **environment(),
  }
  write(ROOT / "benchmarks" / "results" / name, table, text, notes)
  print(markdown(table))


if __name__ == "__main__":
  huge_pages.restart_with()
  main()
