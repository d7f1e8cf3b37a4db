"""Times the drawing of multi-block masks: both modes, two grids, two batch sizes.

  python benchmarks/masks.py [--rounds=50]

Prints a table and the same numbers as JSON. One draw is one call of the jitted sampler.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time

import jax
import numpy as np

from jepax.masks.multiblock import MultiBlock

GRIDS = ((14, 14), (16, 16))  # ViT-B/16 and ViT-H/14 at 224 pixels
BATCHES = (128, 1024)
COMPAT = (None, "ijepa")


def milliseconds(sampler: MultiBlock, *, batch: int, rounds: int) -> float:
  """Median time of a draw for `batch` images, over `rounds` draws after the one that compiles."""
  draw = jax.jit(lambda key: sampler(jax.random.split(key, batch), jax.random.fold_in(key, 1)))
  keys = jax.random.split(jax.random.key(0), rounds + 1)
  seconds = []
  for key in keys:
    start = time.perf_counter()
    jax.block_until_ready(draw(key))
    seconds.append(time.perf_counter() - start)
  return 1000 * statistics.median(seconds[1:])


def measure(rounds: int) -> list[dict]:
  """One row a combination of mode, grid and batch."""
  rows = []
  for compat, grid, batch in itertools.product(COMPAT, GRIDS, BATCHES):
    took = milliseconds(MultiBlock(grid=grid, compat=compat), batch=batch, rounds=rounds)
    rows.append(
      {
        "mode": compat or "default",
        "grid": f"{grid[0]}x{grid[1]}",
        "batch": batch,
        "ms": round(took, 3),
        "us_per_image": round(1000 * took / batch, 2),
      }
    )
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    "--rounds", type=int, default=50, help="timed draws a row; their median counts"
  )
  rows = measure(parser.parse_args().rounds)
  print("".join(f"{name:>14}" for name in rows[0]))
  for row in rows:
    print("".join(f"{value:>14}" for value in row.values()))
  hardware = {
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    "jax": jax.__version__,
    "numpy": np.__version__,
  }
  print(json.dumps({"hardware": hardware, "rows": rows}))


if __name__ == "__main__":
  main()
