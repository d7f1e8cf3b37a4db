"""Compiles a training step for devices that are described, not there, and reads what it needs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jepax.experiment import Experiment
from jepax.planning.hlo import Traffic, collectives

_SHORTAGE = re.compile(
  r"(?:Ran out of memory|CompileTimeHbmOom).*?([\d.]+)([KMGT])\)? exceeds available HBM "
  r"\(([\d.]+)([KMGT])\)",
  re.DOTALL,
)
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
REMATERIALISATION = "Involuntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device while a step runs.

  arguments: the state and the batch. outputs: the new state and the metrics; aliased: the part of
  them that takes the arguments' place. temporaries: activations and workspace. code: the program.
  peak: the most in use at once, by the compiler's own account. needed: what has to fit.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int
  peak: int
  needed: int


@dataclasses.dataclass(frozen=True)
class Program:
  """A step as compiled, or why it was not.

  memory, collectives: None where the compiler refused the program as too large; `shortage` then
  has the bytes it needed and those there are. rematerialised: warnings that an activation is
  gathered whole because no direct way leads from one placement to another. seconds: of compiling.
  """

  memory: Memory | None
  collectives: dict[str, Traffic] | None
  shortage: tuple[float, float] | None
  rematerialised: tuple[str, ...]
  seconds: float

  @property
  def needed(self) -> float:
    """Bytes on each device."""
    return self.memory.needed if self.memory else self.shortage[0]


def trace(experiment: Experiment) -> jax.stages.Traced:
  """The training step of a run, traced for its batch and its mesh."""
  c = experiment.data
  shape = (experiment.config.batch_size, c.size, c.size, c.channels)
  image = jax.ShapeDtypeStruct(shape, np.uint8, sharding=experiment.batch_sharding)
  with jax.set_mesh(experiment.mesh):
    # The jitted function itself, under the wrapper that enters the mesh.
    return experiment.train_step.__wrapped__.trace(experiment.abstract_state, {"image": image})


def compile_step(experiment: Experiment) -> Program:
  """Compiles the step that `fit` would run, with its placements and donation.

  Raises:
    jax.errors.JaxRuntimeError: whatever the compiler objects to other than the size.
  """
  start = time.perf_counter()
  platform = experiment.mesh.devices.flat[0].platform
  compiled, shortage = None, None
  with stderr() as lines:
    lowered = trace(experiment).lower()
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      shortage = _shortage(str(error))
      if shortage is None:
        raise
  return Program(
    memory=memory(compiled.memory_analysis(), platform) if compiled else None,
    collectives=collectives(compiled.as_text()) if compiled else None,
    shortage=shortage,
    rematerialised=tuple(line.strip() for line in lines if REMATERIALISATION in line),
    seconds=time.perf_counter() - start,
  )


def state_bytes(experiment: Experiment) -> int:
  """Bytes of the training state on each device."""
  leaves = jax.tree.leaves(experiment.abstract_state)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def memory(analysis: Any, platform: str) -> Memory:
  """What a compiled program takes, from its `memory_analysis()`; platform: 'tpu', 'gpu', ..."""
  found = Memory(
    arguments=analysis.argument_size_in_bytes,
    outputs=analysis.output_size_in_bytes,
    aliased=analysis.alias_size_in_bytes,
    temporaries=analysis.temp_size_in_bytes,
    code=analysis.generated_code_size_in_bytes,
    peak=analysis.peak_memory_in_bytes,
    needed=0,
  )
  # A TPU's peak includes the gaps between its buffers, its temporaries have them twice: with the
  # peak, sums are those that libtpu logs ('Total hbm usage') and accepts or refuses programs by.
  held = found.arguments + found.outputs - found.aliased + found.temporaries
  needed = (found.peak if platform == "tpu" else held) + found.code
  return dataclasses.replace(found, needed=needed)


def _shortage(message: str) -> tuple[float, float] | None:
  """(needed, available) bytes, where that is what the compiler complains of."""
  found = _SHORTAGE.search(message) or _USED.search(message)
  if not found:
    return None
  needed, needed_unit, available, available_unit = found.groups()
  return float(needed) * _UNITS[needed_unit], float(available) * _UNITS[available_unit]


@contextlib.contextmanager
def stderr() -> Iterator[list[str]]:
  """Collects what is written to the file descriptor 2, by C++ too; the list fills at the end.

  After an error the text is written after all, but for a ValueError, which says enough.
  """
  lines: list[str] = []
  sys.stderr.flush()
  kept = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)
    try:
      yield lines
    except BaseException as error:
      if not isinstance(error, ValueError):
        file.seek(0)
        os.write(kept, file.read())
      raise
    finally:
      sys.stderr.flush()
      os.dup2(kept, 2)
      os.close(kept)
      file.seek(0)
      lines.extend(file.read().decode(errors="replace").splitlines())
