"""Several processes: how they find one another, and what they have to agree on.

One process is the usual case: then nothing here has an effect. What needs JAX's devices (`agree`,
`on_first`, ...) comes after `initialize`, and every process calls it.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

# What stands for the flags of the same names; launch/local.py sets them.
VARIABLES = {
  "coordinator_address": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
HEARTBEAT = 60  # seconds; a process that is silent for longer counts as lost


def initialize(
  *,
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_timeout: int = HEARTBEAT,
) -> bool:
  """Joins the other processes, if there are any; call it before anything touches the devices.

  Who they are comes from the arguments, else from the environment: JAX_COORDINATOR_ADDRESS,
  JAX_NUM_PROCESSES and JAX_PROCESS_ID, a SLURM step of several tasks, or a Cloud TPU pod.

  Args:
    coordinator_address: host:port of process 0, where it listens and the others find it.
    num_processes: how many there are.
    process_id: which this one is, 0 to num_processes - 1.
    heartbeat_timeout: seconds after which a silent process counts as lost, and the others end.

  Returns:
    Whether there are others.

  Raises:
    ValueError: only some of the three arguments, or numbers that can't be.
  """
  if heartbeat_timeout < 1:
    raise ValueError(f"heartbeat_timeout={heartbeat_timeout} must be at least 1 second")
  given = _given(coordinator_address, num_processes, process_id)
  if not given and not _slurm(os.environ) and not _tpu_pod(os.environ):
    return False
  if given:  # and nothing but that, whatever the environment looks like
    given["cluster_detection_method"] = "deactivate"
  elif _slurm(os.environ):
    given = {"local_device_ids": _slurm_gpus(os.environ)}
  jax.distributed.initialize(
    **given,
    heartbeat_timeout_seconds=heartbeat_timeout,
  )
  # jax.process_count() would start the devices, of which a config may still set the number.
  return given["num_processes"] > 1 if "num_processes" in given else True


def _given(address: str | None, count: int | None, index: int | None) -> dict[str, str | int]:
  """The three from arguments and variables, checked; empty where none is given."""
  values = dict(zip(VARIABLES, (address, count, index), strict=True))
  for name, variable in VARIABLES.items():
    if values[name] is None and variable in os.environ:
      values[name] = os.environ[variable]
  missing = [name for name, value in values.items() if value is None]
  if len(missing) == len(values):
    return {}
  if missing:
    raise ValueError(
      f"several processes need --coordinator_address, --num_processes and --process_id (or "
      f"{', '.join(VARIABLES.values())}), all three or none; found no {', '.join(missing)}"
    )
  try:
    count, index = int(values["num_processes"]), int(values["process_id"])
  except ValueError as error:
    raise ValueError(f"num_processes and process_id must be whole numbers: {error}") from None
  if not re.fullmatch(r".+:\d+", values["coordinator_address"]) or not 0 <= index < count:
    raise ValueError(
      f"coordinator_address={values['coordinator_address']!r} must read host:port, and "
      f"process_id={index} lie in 0..{count - 1}, num_processes being {count}"
    )
  return {**values, "num_processes": count, "process_id": index}


def _slurm(environment: Mapping[str, str]) -> bool:
  """Whether `srun` started this as one of several tasks; a batch script alone is no task."""
  if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= environment.keys():
    return False
  return int(environment["SLURM_NTASKS"]) > 1


def _slurm_gpus(environment: Mapping[str, str]) -> list[int] | None:
  """This task's share of the GPUs that it sees; left to itself, JAX takes one a task.

  None where there is no GPU.
  """
  if "CUDA_VISIBLE_DEVICES" not in environment:
    return None
  visible = len([d for d in environment["CUDA_VISIBLE_DEVICES"].split(",") if d.strip()])
  tasks = int(re.match(r"\d+", environment["SLURM_STEP_TASKS_PER_NODE"]).group())  # '4(x2)'
  if visible < tasks:  # each task sees its own alone
    return list(range(visible)) or None
  share, place = visible // tasks, int(environment["SLURM_LOCALID"])
  return list(range(place * share, (place + 1) * share))


def _tpu_pod(environment: Mapping[str, str]) -> bool:
  """Whether this host has TPU chips whose neighbours JAX can ask for.

  On Google's TPU machines JAX asks their metadata server; elsewhere that would only time out.
  """
  if "TPU_WORKER_HOSTNAMES" in environment:  # GKE
    several = "," in environment["TPU_WORKER_HOSTNAMES"]
    return several or "MEGASCALE_COORDINATOR_ADDRESS" in environment
  if "TPU_SKIP_MDS_QUERY" in environment or "tpu" not in (jax.config.jax_platforms or "tpu"):
    return False
  chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def agree(value: float) -> float:
  """Process 0's value on all of them, in float32: for decisions that all have to take alike."""
  if jax.process_count() == 1:
    return value
  return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def on_first(action: Callable[[], object]) -> None:
  """Runs an action on process 0; where it refuses, all processes do.

  Raises:
    ValueError: the action raised it, or an OSError.
  """
  error = None
  if jax.process_index() == 0:
    try:
      action()
    except (ValueError, OSError) as refused:
      error = refused
  if agree(error is not None):
    raise error or ValueError("process 0 can't start; its own message says why")


def on_all(holds: bool, *, error: str) -> None:
  """Raises ValueError on all processes, naming those where something does not hold."""
  if jax.process_count() == 1:
    found = np.array([holds])
  else:
    found = multihost_utils.process_allgather(np.array(holds))
  if not found.all():
    raise ValueError(f"{error} (process {', '.join(map(str, np.flatnonzero(~found)))})")


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
  """Ends this process on an error without a wait for the others, which notice that it is gone.

  The ordinary way out is a barrier that all processes meet at; those that still train would not.
  """
  try:
    yield
  except BaseException as error:
    if not jax.distributed.is_initialized():
      raise
    if not isinstance(error, SystemExit):
      traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
