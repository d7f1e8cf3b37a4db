"""Trains a tiny run in a process of its own, which may send itself a signal on the way.

python tests/run_tiny.py METHOD WORKDIR [STEP SIGNAL]
"""

from __future__ import annotations

import os
import signal
import sys

import tiny

from jepax import fit


def signal_at(step: int, number: int) -> None:
  """Makes the loop receive a signal once it has done `step` updates."""
  between = fit.Trainer.between

  def wrapped(self, done, *arguments):
    if done == step:
      os.kill(os.getpid(), number)
    return between(self, done, *arguments)

  fit.Trainer.between = wrapped


if __name__ == "__main__":
  method, workdir, *rest = sys.argv[1:]
  if rest:
    signal_at(int(rest[0]), signal.Signals[rest[1]])
  config = tiny.config(
    method, total="40 steps", checkpoint__every="10 steps", eval__every=0, mesh__fsdp=2
  )
  print(fit.run(config, workdir, data=tiny.data())["train"]["status"])
