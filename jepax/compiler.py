"""What XLA is asked to do otherwise than by default."""

from __future__ import annotations

import functools
import os
from types import MappingProxyType

import jax
from jax.sharding import Mesh

# Matrix products are oneDNN's and sums YNNPACK's, to which jaxlib 0.10 gives both. On two cores of
# a Xeon with AMX attention's batched products reach 30 to 70 GFLOP/s by Eigen or YNNPACK and 80 to
# 160 by oneDNN, others 5 % more by oneDNN than by Eigen. Products alone: what oneDNN fuses behind
# them is no faster. A jaxlib without oneDNN (on ARM) leaves them to Eigen.
_CPU = MappingProxyType(
  {
    "xla_cpu_use_onednn": True,
    "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
  }
)


def options(mesh: Mesh) -> dict[str, bool | str]:
  """Of `jax.jit(compiler_options=...)`, for programs that run on a mesh; XLA_FLAGS come first."""
  if mesh.devices.flat[0].platform != "cpu":
    return {}
  flags = {flag.partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
  return {
    name: value for name, value in _CPU.items() if f"--{name}" not in flags and _known(name, value)
  }


@functools.cache
def _known(name: str, value: bool | str) -> bool:
  """Whether this XLA has the option; most bear the word experimental."""
  try:
    jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True
