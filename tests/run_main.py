"""python -m jepax.main, one of whose processes sends itself a signal on the way.

python tests/run_main.py PROCESS STEP SIGNAL --config=... (the flags of jepax.main)
"""

from __future__ import annotations

import os
import signal
import sys
import time

import jax
from absl import app

from jepax import cli, fit, main

PAUSE = 0.5  # seconds a step after the signal: the preemption service takes a moment to tell all


def signal_at(process: int, step: int, number: int) -> None:
  """Makes a process signal itself once it has done `step` updates."""
  between = fit.Trainer.between

  def wrapped(self, done, *arguments):
    if done == step and jax.process_index() == process:
      self.saved.wait()  # so that it is known which step a run resumes from
      os.kill(os.getpid(), number)
    if done >= step:
      time.sleep(PAUSE)
    return between(self, done, *arguments)

  fit.Trainer.between = wrapped


if __name__ == "__main__":
  process, step, name = sys.argv[1:4]
  del sys.argv[1:4]
  signal_at(int(process), int(step), signal.Signals[name])
  app.run(main.main, flags_parser=lambda argv: cli.parse(argv, prefix="--config."))
