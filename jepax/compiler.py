"""What XLA is asked to do otherwise than by default."""

from __future__ import annotations

import functools
from types import MappingProxyType

import jax
from jax.sharding import Mesh

# YNNPACK is left the sums; matrix products go to Eigen. On a Xeon with AMX one core of it reaches
# 75 to 100 GFLOP/s by YNNPACK, which jaxlib 0.10 takes, and 100 to 135 by Eigen.
_CPU = MappingProxyType({"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"})


def options(mesh: Mesh) -> dict[str, str]:
  """Of `jax.jit(compiler_options=...)`, for programs that run on a mesh."""
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  return dict(_CPU) if on_cpu and _known() else {}


@functools.cache
def _known() -> bool:
  """Whether this XLA has the options, which bear the word experimental."""
  try:
    jax.jit(lambda x: x, compiler_options=dict(_CPU)).lower(0).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True
