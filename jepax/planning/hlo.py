"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|true_computation|false_computation|"
  r"branch_computations|called_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_KNOWN_LENGTH = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r"= s(?:32|64)\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """count: how often a kind of collective runs in a step; bytes: of its results, on one device."""

  count: int
  bytes: int


def collectives(text: str) -> dict[str, Traffic]:
  """The collectives of one run of a program, by kind.

  Those in a loop count as often as it runs; where its length can't be read, once. Of the branches
  of a condition all count.

  Args:
    text: `compiled.as_text()`.
  """
  entry, bodies = split(text)
  totals = collections.Counter()
  sizes = collections.Counter()

  def walk(name: str, times: int) -> None:
    for line in bodies[name]:
      found = _INSTRUCTION.match(line)
      if not found:
        continue
      shape, operation = found.groups()
      kind = operation.removesuffix("-done").removesuffix("-start")
      if kind in KINDS:  # a start's result holds its operand too
        if not operation.endswith("-start"):
          totals[kind] += times
          sizes[kind] += times * bytes_of(shape)
        continue
      length = turns(line, bodies) if operation == "while" else 1
      if operation not in ("async-update", "async-done"):
        for called in _CALLED.findall(line):
          for inner in called.replace("%", "").split(", "):
            walk(inner, times * length)

  walk(entry, 1)
  return {kind: Traffic(totals[kind], sizes[kind]) for kind in KINDS if totals[kind]}


def split(text: str) -> tuple[str, dict[str, list[str]]]:
  """The entry's name, and the lines of each computation."""
  entry, current, found = "", "", collections.defaultdict(list)
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = header[2]
      entry = current if header[1] else entry
    elif current:
      found[current].append(line)
  return entry, found


def turns(line: str, computations: dict[str, list[str]]) -> int:
  """How often a while loop runs: what the compiler says, or the bound it counts up to."""
  if known := _KNOWN_LENGTH.search(line):
    return int(known[1])
  condition = computations[_CONDITION.search(line)[1]]
  bounds = {int(bound[1]) for inner in condition if (bound := _BOUND.search(inner))}
  return bounds.pop() if len(bounds) == 1 else 1


def bytes_of(shape: str) -> int:
  """Of an array or a tuple of them: 'f32[8,4]{1,0}' is 128."""
  bits = 0
  for kind, width, sizes in _ARRAY.findall(shape):
    elements = math.prod(int(n) for n in sizes.split(",") if n)
    bits += elements * (8 if kind == "pred" else int(width))
  return bits // 8
