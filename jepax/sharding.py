"""Mesh, placement rules and activation constraints: one device is a mesh of one.

Axes: `data` (parameters replicated along it) and `fsdp` (parameters split along it); a batch is
split over both. Everything is automatic sharding under jit: the same program, any mesh.
"""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
MIN_SHARDED_SIZE = 2**10  # smaller leaves cost more to gather than to hold


def use_all_cores(*, rows: int, count: int = 0) -> None:
  """Makes the CPU that many devices; call it before anything is computed.

  Small models run 1.6x as fast on one device a core as on one device with a thread a core. Without
  effect where another platform is used, or where the number was set by the user (XLA_FLAGS,
  JAX_NUM_CPU_DEVICES).

  Args:
    rows: of a (micro-)batch, which has to divide over the devices.
    count: devices; 0 for as many of the cores as leave each at least 8 rows.

  Raises:
    ValueError: a negative count.
  """
  if count < 0:
    raise ValueError(f"mesh.cpu_devices={count} must be 0, for a good number, or above")
  if jax.config.jax_num_cpu_devices != -1 or "device_count" in os.environ.get("XLA_FLAGS", ""):
    return
  most = min(cores(), max(1, rows // 8))
  best = max(n for n in range(1, most + 1) if rows % n == 0)
  jax.config.update("jax_num_cpu_devices", count or best)


def cores() -> int:
  """CPU cores this process may use."""
  affinity = getattr(os, "sched_getaffinity", None)  # which macOS lacks
  return len(affinity(0)) if affinity else os.cpu_count()


def make_mesh(*, data: int = -1, fsdp: int = 1, devices: list | None = None) -> Mesh:
  """A (data, fsdp) mesh over all devices, or over those given.

  Args:
    data: devices along `data`; -1 for all that `fsdp` leaves.
    fsdp: devices along `fsdp`; -1 for all that `data` leaves.
    devices: default `jax.devices()`.

  Raises:
    ValueError: sizes that don't multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes, count = [data, fsdp], len(devices)
  known = math.prod(s for s in sizes if s != -1)
  wrong = any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1
  if not wrong and -1 in sizes and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if wrong or math.prod(sizes) != count:
    raise ValueError(
      f"mesh data={data}, fsdp={fsdp} does not fit {count} device(s): sizes are positive, one of "
      f"them may be -1 (the rest), and their product must be {count}"
    )
  # Auto, not the default Explicit: linen's conv gradient and concat fail under Explicit axes.
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows split over every device."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def is_stacked(path: jax.tree_util.KeyPath) -> bool:
  """Whether a leaf belongs to a scanned stack of blocks, so that its first axis is the layer."""
  return any(getattr(key, "key", None) == "blocks" for key in path)


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """Where each leaf of a state lies; target and optimizer moments lie as their parameters.

  Args:
    mesh: from `make_mesh`.
    state: a tree of arrays or ShapeDtypeStructs.

  Returns:
    A tree of NamedSharding: the largest axis that divides by the `fsdp` size is split, never
    the layer axis of a scanned stack; small leaves are replicated.
  """
  size = mesh.shape["fsdp"]

  def place(path, leaf) -> NamedSharding:
    axes = [i for i, n in enumerate(leaf.shape) if i >= is_stacked(path) and n % size == 0]
    if size == 1 or not axes or math.prod(leaf.shape) < MIN_SHARDED_SIZE:
      return replicated(mesh)
    axis = max(axes, key=lambda i: leaf.shape[i])
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

  return jax.tree_util.tree_map_with_path(place, state)


def constrain(x: jax.Array) -> jax.Array:
  """Keeps an activation split by rows, inside `jax.set_mesh`; elsewhere does nothing.

  Without this XLA may gather whole batches to match split parameters.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or set(mesh.axis_names) != set(AXES) or x.shape[0] % mesh.size:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(AXES))


def global_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """This process's rows -> global arrays whose leading axis spans all processes."""
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
