"""How long steps take, and how long they wait for input."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax


class StepTimer:
  """Wall time of training steps over one logging interval, without evaluations and saves.

  JAX returns before the device is done: fetch a metric of the last step before `summary`.
  """

  def __init__(
    self, batch_size: int, *, start_step: int, clock: Callable[[], float] = time.perf_counter
  ):
    """Starts the first interval.

    Args:
      batch_size: images a step, over all processes.
      start_step: updates done.
      clock: seconds, for tests.
    """
    self._batch_size, self._clock = batch_size, clock
    # Sees the device fall idle while the training thread waits for its batch.
    self._watcher = ThreadPoolExecutor(1, "step timer")
    self.reset(start_step)

  def reset(self, step: int) -> None:
    """Starts an interval at this step."""
    self._step, self._begin, self._waited, self._paused = step, self._clock(), 0.0, 0.0

  @contextlib.contextmanager
  def waiting(self, running: Any = ()) -> Iterator[None]:
    """Counts the block as waiting for input, from when the device has nothing else to do.

    Args:
      running: arrays of the step before, which the device may be computing still: as long as it
        is, nobody waits.
    """
    begin = self._clock()
    busy = not all(array.is_ready() for array in jax.tree.leaves(running))
    idle = self._watcher.submit(self._finished, running) if busy else None
    try:
      yield
    finally:
      end = self._clock()
      if idle is None:
        self._waited += end - begin
      elif idle.done():
        self._waited += max(0.0, end - idle.result())

  def _finished(self, running: Any) -> float:
    """The time at which arrays are there."""
    jax.block_until_ready(running)
    return self._clock()

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves the block out of all numbers: evaluation, saving, compilation."""
    begin = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - begin

  def summary(self, step: int) -> dict[str, float]:
    """The interval up to this step, and the start of the next.

    Args:
      step: updates done.

    Returns:
      'time/images_per_second'; 'time/step_seconds', seconds; 'input/wait', share of the time.

    Raises:
      ValueError: no step since the interval began.
    """
    steps = step - self._step
    if steps < 1:
      raise ValueError(f"no step to time: the interval began at step {self._step}, now {step}")
    seconds = self._clock() - self._begin - self._paused
    summary = {
      "time/images_per_second": steps * self._batch_size / seconds,
      "time/step_seconds": seconds / steps,
      "input/wait": self._waited / seconds,
    }
    self.reset(step)
    return summary
