"""What the training step makes an H100 do, read from its compiled program; no GPU is needed.

  python benchmarks/gpu_program.py [--largest=12] [CONFIG[,KEY=VALUE ...] ...]

Compiles each case ahead of time for one H100 (pip install 'jepax[cuda]') and counts, kernel by
kernel, what it computes and what it reads from and writes to the device's memory. Each takes at
least the time of the slower of the two at the chip's peaks; the sum is a time that no run of these
kernels beats, and so the program's MFU is at most what it says. It is no measurement: matrix
products reach two thirds to three quarters of the peak, nothing here overlaps or comes from a
cache, and with a GPU at hand XLA may choose other kernels. Writes
benchmarks/results/gpu_program.json and .md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import math
import os
import pathlib
import re
import sys
import time

from jepax.planning import environment

HERE = pathlib.Path(__file__).parent
TOPOLOGY = "h100:1x1"
BANDWIDTH = 3.35e12  # bytes a second of its memory, NVIDIA's data sheet
SCANNED = "configs/ijepa_vith14.py,batch_size=128"  # as the recipe is: blocks scanned, remat 'dots'
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
_SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\["(\d+)"')
_CALLS = re.compile(r"\b(?:body|to_apply)=%?([\w.\-]+)")
_NAME = re.compile(r'op_name="([^"]*)"')
# What takes no time: names for what is there already.
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all")


@dataclasses.dataclass(frozen=True)
class Kernel:
  """kind: "product", "attention" or "other". times: runs a step. moved: bytes; flops: of a run."""

  kind: str
  operation: str
  times: int
  moved: float
  flops: float

  def least(self, peak: float) -> float:
    """Seconds of all its runs that the chip can't do without."""
    return self.times * max(self.moved / BANDWIDTH, self.flops / peak)


def kernels(text: str) -> list[Kernel]:
  """Those of one run of a program, from its HLO text."""
  from jepax.planning import hlo

  entry, bodies = hlo.split(text)
  found = []

  def walk(name: str, times: int) -> None:
    shapes = {}
    for line in bodies[name]:
      if not (match := _INSTRUCTION.match(line)):
        continue
      result, shape, operation, rest = match.groups()
      shapes[result] = shape
      if operation in ("while", "call", "conditional"):
        length = hlo.turns(line, bodies) if operation == "while" else 1
        for inner in _CALLS.findall(line):
          walk(inner, times * length)
      elif operation not in _FREE:
        operands = [shapes.get(n, "") for n in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
        found.append(_kernel(line, shape, operands, times))

  walk(entry, 1)
  return found


def _kernel(line: str, shape: str, operands: list[str], times: int) -> Kernel:
  moved = sum(_bytes(s, times) for s in (shape, *operands))
  named = _NAME.search(line)
  name = re.sub(r"block\d+", "block", named[1].split("jit(step)/")[-1]) if named else "?"
  if contracted := _CONTRACTED.search(line):
    inner = _sizes(operands[0])[int(contracted[1])]
    return Kernel("product", name, times, moved, 2 * inner * _count(shape))
  if "fmha" in line:  # queries, keys [b n h e]; scores and sums, and backward five for those two
    (b, n, h, e), m = _sizes(operands[0]), _sizes(operands[1])[1]
    products = 5 if "Backward" in line else 2
    return Kernel("attention", name, times, moved, 2 * products * b * h * n * m * e)
  return Kernel("other", name, times, moved, 0)


def _bytes(shape: str, times: int) -> float:
  """Of arrays that a kernel in a loop reads or writes: of those of all turns, one turn's part."""
  from jepax.planning import hlo

  total = 0.0
  for array in _SHAPE.finditer(shape):
    sizes = _sizes(array[0])
    stacked = times > 1 and len(sizes) > 1 and sizes[0] == times
    total += hlo.bytes_of(array[0]) / (times if stacked else 1)
  return total


def _sizes(shape: str) -> list[int]:
  """Of the first array of a shape."""
  return [int(n) for n in _SHAPE.search(shape)[1].split(",") if n]


def _count(shape: str) -> int:
  return math.prod(_sizes(shape))


def study(spec: str, *, largest: int) -> dict:
  """Compiles a case and counts."""
  from jepax import config as config_lib
  from jepax.planning import aot, plan, targets

  path, *overrides = spec.split(",")
  target = targets.find(TOPOLOGY)
  config = config_lib.load(str(HERE.parent / path), overrides)
  marks = [time.perf_counter()]
  experiment = plan.describe(config, target, examples=10**6)
  marks.append(time.perf_counter())
  compiled = aot.trace(experiment).lower().compile()
  marks.append(time.perf_counter())
  flops = plan.step_flops(config, target, 10**6)
  found = kernels(compiled.as_text())
  peak = target.chip.peak
  sums, least = collections.Counter(), collections.Counter()
  operations = collections.Counter()
  for kernel in found:
    sums[kernel.kind] += kernel.times
    least[kernel.kind] += kernel.least(peak)
    if kernel.kind == "other":
      operations[kernel.operation] += kernel.times * kernel.moved
  memory = aot.memory(compiled.memory_analysis(), "gpu")
  return {
    "case": spec,
    "flops": flops,
    "milliseconds": {kind: 1000 * seconds for kind, seconds in least.items()},
    "kernels": dict(sums),
    "mfu_at_most": flops / (sum(least.values()) * peak),
    "peak_gib": memory.needed / 2**30,
    "trace_seconds": marks[1] - marks[0],
    "compile_seconds": marks[2] - marks[1],
    "moved_gb": {name: moved / 1e9 for name, moved in operations.most_common(largest)},
  }


def table(results: list[dict]) -> str:
  """Markdown: a row a case, then what moves most in each."""
  kinds = ("product", "attention", "other")
  lines = [
    "| MFU at most | case | TFLOP | at least, ms | of it: products | attention | other kernels | "
    "kernels | peak, GiB | trace, s | compile, s |",
    "|---" * 11 + "|",
  ]
  for r in results:
    parts = [r["milliseconds"][kind] for kind in kinds]
    cells = [
      f"{r['mfu_at_most']:.0%}",
      r["case"],
      f"{r['flops'] / 1e12:.1f}",
      f"{sum(parts):.1f}",
      *(f"{part:.1f}" for part in parts),
      f"{sum(r['kernels'].values()):,}",
      f"{r['peak_gib']:.1f}",
      f"{r['trace_seconds']:.1f}",
      f"{r['compile_seconds']:.0f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  for r in results:
    lines += [
      "",
      f"Most moved by other kernels, {r['case']}:",
      "",
      "| GB a step | operation |",
      "|---|---|",
    ]
    lines += [f"| {moved:.1f} | `{name[-90:]}` |" for name, moved in r["moved_gb"].items()]
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("cases", nargs="*", help="CONFIG[,KEY=VALUE ...]")
  parser.add_argument("--largest", type=int, default=12, help="operations listed of each case")
  options = parser.parse_args()
  wanted = environment.variables(TOPOLOGY)
  wanted.pop("JAX_OPTIMIZATION_LEVEL")  # the program that would run
  os.environ.update(wanted)
  import step_time

  from jepax.versions import environment as versions

  results = []
  for spec in options.cases or (*step_time.CASES["cuda"], SCANNED):
    results.append(study(spec, largest=options.largest))
    print(table(results[-1:]), flush=True)
  command = " ".join(["python benchmarks/gpu_program.py", *sys.argv[1:]])
  notes = {"date": datetime.date.today().isoformat(), "command": command, **versions()}
  notes |= {"devices": "one H100 SXM 80GB, described, not run on"}
  text = "\n\n".join([__doc__.split("\n\n")[2].strip(), table(results)])
  step_time.write("gpu_program", "What the training step makes an H100 do", text, results, notes)


if __name__ == "__main__":
  main()
