"""Mesh, placement rules and activation constraints: one device is a mesh of one.

Axes: `data` (parameters replicated along it), `fsdp` (parameters split along it, gathered where
they are used) and `tensor` (heads and hidden units split along it). A batch is split over the first
two. Everything is automatic sharding under jit: the same program, any mesh.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what the rows of a batch are split over
MIN_SHARDED_SIZE = 2**10  # smaller leaves cost more to gather than to hold

# The axis of a block's parameter that is split over `tensor`. Outputs and then inputs, so that a
# branch communicates once, when the sums over its inputs are added up. All else is replicated.
TENSOR_RULES = (
  (re.compile(r"/block(s|\d+)/(qkv|fc1)/(kernel|bias)$"), -1),  # heads, hidden units
  (re.compile(r"/block(s|\d+)/(proj|fc2)/kernel$"), -2),
)


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


def make_mesh(
  *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """A (data, fsdp, tensor) mesh over all devices, or over those given.

  Of several slices, which a slower network connects, `data` spans them and the others stay inside.

  Args:
    data: devices along `data`; -1 for all that the others leave.
    fsdp: devices along `fsdp`; -1 for all that the others leave.
    tensor: devices along `tensor`; they should be neighbours, so few.
    devices: default `jax.devices()`.

  Raises:
    ValueError: sizes that don't multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes, count = [data, fsdp, tensor], len(devices)
  known = math.prod(s for s in sizes if s != -1)
  wrong = any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1
  if not wrong and -1 in sizes and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if wrong or math.prod(sizes) != count:
    raise ValueError(
      f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {count} device(s): sizes are "
      f"positive, one of them may be -1 (the rest), and their product must be {count}"
    )
  # Auto, not the default Explicit: linen's conv gradient and concat fail under Explicit axes.
  types = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, "slice_index", 0) for device in devices})  # CPUs have no number
  if slices == 1:
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
  return Mesh(_across_slices(devices, sizes, slices), AXES, axis_types=types)


def _across_slices(devices: list, sizes: list[int], slices: int) -> np.ndarray:
  """Devices of several slices such that what communicates most stays inside one."""
  data, *inner = sizes
  if data % slices == 0:
    return mesh_utils.create_hybrid_device_mesh(
      (data // slices, *inner), (slices, 1, 1), devices, allow_split_physical_axes=True
    )
  logging.warning(
    "mesh data=%d does not divide over %d slices: fsdp or tensor cross the slow network",
    data,
    slices,
  )
  order = sorted(devices, key=lambda device: (device.slice_index, device.id))
  return np.array(order, dtype=object).reshape(sizes)


def row_parts(mesh: Mesh | AbstractMesh) -> int:
  """Parts that the rows of a batch are split into."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def local_rows(sharding: NamedSharding, *, count: int) -> np.ndarray:
  """The rows of a global batch that this process holds, which need not lie side by side.

  Args:
    sharding: of the batch, see `batch_sharding`.
    count: rows of the global batch.

  Returns:
    i64[n], ascending.
  """
  indices = sharding.addressable_devices_indices_map((count,)).values()
  return np.unique([row for (part,) in indices for row in range(count)[part]])


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows split over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


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
    A tree of NamedSharding: the axis that TENSOR_RULES name over `tensor`; of the others, the
    largest that divides over `fsdp`, never the layer axis of a scanned stack. Small leaves are
    replicated over `fsdp`.
  """
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]

  def place(path, leaf) -> NamedSharding:
    spec = [None] * len(leaf.shape)
    axis = _tensor_axis(path)
    if tensor > 1 and axis is not None and leaf.shape[axis] % tensor == 0:
      spec[axis] = "tensor"
    free = [i for i in range(is_stacked(path), len(spec)) if spec[i] is None]
    free = [i for i in free if leaf.shape[i] % fsdp == 0]
    if fsdp > 1 and free and math.prod(leaf.shape) >= MIN_SHARDED_SIZE:
      spec[max(free, key=lambda i: leaf.shape[i])] = "fsdp"
    while spec and spec[-1] is None:
      spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(place, state)


def _tensor_axis(path: jax.tree_util.KeyPath) -> int | None:
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return next((axis for rule, axis in TENSOR_RULES if rule.search(name)), None)


def constrain(x: jax.Array, *, split: int | None = None) -> jax.Array:
  """Keeps an activation split by rows, inside `jax.set_mesh`; elsewhere does nothing.

  Without this XLA may gather whole batches to match split parameters.

  Args:
    x: [b ...]; rows that don't divide over the devices are left as they are.
    split: an axis that is split over `tensor`: heads or hidden units.

  Raises:
    ValueError: an axis that does not divide over `tensor`.
  """
  mesh = _mesh()
  if mesh is None or (split is None and x.shape[0] % row_parts(mesh)):
    return x
  spec = [None] * x.ndim
  spec[0] = ROWS if x.shape[0] % row_parts(mesh) == 0 else PartitionSpec.UNCONSTRAINED
  if split is not None:
    tensor = mesh.shape["tensor"]
    if x.shape[split] % tensor:
      raise ValueError(
        f"mesh.tensor={tensor} does not divide the {x.shape[split]} heads or hidden units of a "
        "block, over which it splits; choose a divisor"
      )
    spec[split] = "tensor"
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def regroup(x: jax.Array, *, groups: int) -> jax.Array:
  """[... groups*u] -> [... groups u], each group split over `tensor` alike.

  A parameter lies split in one piece a device, which for q, k and v side by side are not the same
  heads of each: it is gathered over `tensor` first, as over `fsdp`, and then cut anew.
  """
  free, cut = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1), tensor_parts() > 1
  if cut and groups > 1:
    x = jax.lax.with_sharding_constraint(x, PartitionSpec(*free, None))
  x = x.reshape(*x.shape[:-1], groups, -1)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*free, None, "tensor")) if cut else x


def tensor_parts() -> int:
  """Devices along `tensor` of the mesh that is set; 1 without one."""
  return _parts("tensor")


def fsdp_parts() -> int:
  """Devices along `fsdp` of the mesh that is set; 1 without one."""
  return _parts("fsdp")


def _parts(axis: str) -> int:
  mesh = _mesh()
  return 1 if mesh is None else mesh.shape[axis]


def platform() -> str:
  """'cpu', 'tpu', ...: of the mesh that is set, which others may run, or of this machine."""
  mesh = _mesh()
  known = mesh is not None and mesh.abstract_device is not None
  return mesh.abstract_device.platform if known else jax.default_backend()


def _mesh() -> AbstractMesh | None:
  """The mesh of `make_mesh` that is set, if any."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or set(mesh.axis_names) != set(AXES) else mesh


def global_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
  """This process's rows -> global arrays whose leading axis spans all processes."""
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
