"""Tracing for an NVIDIA GPU on a machine that has none: JAX's own checks of cuDNN's limits apply.

Whether cuDNN then has a kernel, and how fast it is, only a GPU shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo  # which asks for a version, not for a GPU
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jepax import sharding
from jepax.models import attention


@contextlib.contextmanager
def one() -> Iterator[list[tuple[int, ...]]]:
  """Tracing inside is for one H100. Yields the shapes of queries whose attention is written out."""
  device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
  axes = (AxisType.Auto,) * len(sharding.AXES)
  mesh = AbstractMesh((1, 1, 1), sharding.AXES, axis_types=axes, abstract_device=device)
  written_out, plain = [], attention._plain

  def recorded(q, *rest):
    written_out.append(q.shape)
    return plain(q, *rest)

  with (
    jax.sharding.use_abstract_mesh(mesh),
    mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000),
    mock.patch.object(attention, "_plain", recorded),
  ):
    yield written_out


def cudnn_calls(jaxpr: Any) -> tuple[int, int]:
  """cuDNN's attention in a program, forward and backward; a loop's body counts once."""
  text = str(jaxpr)
  return tuple(text.count(f"dot_product_attention_{way}_wrapper[") for way in ("fwd", "bwd"))
