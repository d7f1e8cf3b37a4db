"""The machines that a plan can be made for: 'v5e:16x16', 'h100:1x8', 'cpu:8'."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import jax
from jax.experimental import topologies

from jepax.names import one_of

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """name: as its maker calls it. peak: FLOP/s, dense, bfloat16, of the whole chip. memory: bytes
  that a program may use on each of its devices; None where nobody set a limit. source: of the peak.
  """

  name: str
  peak: float | None
  memory: float | None
  source: str


# The memory of TPUs is what libtpu 0.0.42 itself says it has when a program asks for too much.
TPUS = {
  "v4": Chip("TPU v4", 275e12, 30.75 * GIB, "cloud.google.com/tpu/docs/v4"),
  "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, "cloud.google.com/tpu/docs/v5e"),
  "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, "cloud.google.com/tpu/docs/v5p"),
  "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, "cloud.google.com/tpu/docs/v6e"),
  "tpu7x": Chip("TPU7x", 2307e12, 94.75 * GIB, "cloud.google.com/tpu/docs/tpu7x"),
}
H100 = Chip("H100 SXM 80GB", 989e12, 80e9, "NVIDIA H100 datasheet, without sparsity")
CPU = Chip("CPU", None, None, "")
KINDS = (*TPUS, "h100", "cpu")

# What XLA asks a driver about the device it compiles for; figures of NVIDIA's documentation.
_H100_DEVICE = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_block_limit: 65536 registers_per_core_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Target:
  """topology: as it was asked for. devices: as JAX sees them, of which a chip may have two."""

  topology: str
  slices: int
  devices: tuple[Any, ...]
  chips: int
  chip: Chip


def find(topology: str, *, slices: int = 1) -> Target:
  """Describes the devices of a topology; none of them has to be there.

  Args:
    topology: 'v5e:16x16' or another TPU's chips, 'h100:HOSTSxGPUS', 'cpu:DEVICES'.
    slices: of a TPU, so many of that topology, joined by the data-centre network.

  Raises:
    ValueError: an unknown kind or shape, or a compiler that is not installed, with what to install.
  """
  kind, _, sizes = topology.partition(":")
  one_of(kind, KINDS, where="--topology")
  if slices < 1 or (slices > 1 and kind not in TPUS):
    raise ValueError(f"--slices={slices}: TPUs alone have slices, 1 or more")
  if kind in TPUS:
    return _tpu(topology, kind, slices)
  return _h100(topology, sizes) if kind == "h100" else _cpu(topology, sizes)


def _tpu(topology: str, kind: str, slices: int) -> Target:
  _need("libtpu", "pip install 'jepax[tpu]'", topology)
  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if kind == "v4":
    options["chip_config_name"] = "megacore"  # JAX's own default on a real one: a device a chip
  try:
    described = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
  places = {(getattr(d, "slice_index", 0), tuple(d.coords)) for d in described}
  return Target(topology, slices, tuple(described), len(places), TPUS[kind])


def _h100(topology: str, sizes: str) -> Target:
  hosts, _, gpus = sizes.partition("x")
  if not (hosts.isdigit() and gpus.isdigit()):
    raise ValueError(f"--topology={topology}: write h100:HOSTSxGPUS, such as h100:1x8")
  _need("jax_cuda13_plugin", "pip install 'jepax[cuda]'", topology)
  described = topologies.get_topology_desc(
    platform="cuda", topology_name="", target_config=_H100_DEVICE, topology=f"1x{hosts}x{gpus}"
  ).devices
  return Target(topology, 1, tuple(described), len(described), H100)


def _cpu(topology: str, sizes: str) -> Target:
  if not sizes.isdigit() or int(sizes) < 1:
    raise ValueError(f"--topology={topology}: write cpu:DEVICES, such as cpu:8")
  devices = jax.devices("cpu")
  if len(devices) < int(sizes):
    raise ValueError(
      f"--topology={topology}: JAX has made {len(devices)} CPU device(s) of this machine; set "
      f"JAX_NUM_CPU_DEVICES={sizes} before it is imported"
    )
  return Target(topology, 1, tuple(devices[: int(sizes)]), int(sizes), CPU)


def _need(module: str, command: str, topology: str) -> None:
  if importlib.util.find_spec(module) is None:
    raise ValueError(
      f"--topology={topology} needs its compiler, the Python package {module}, which is not "
      f"installed; no such chip is needed: {command}"
    )
