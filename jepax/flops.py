"""Model FLOPs, counted from the shapes in a traced program: any method, no formula for each.

What is counted are matrix products and convolutions of real numbers, two operations for each
multiplication with its addition, as many as the program makes: three times the forward pass of what
is trained (less the gradient of the images, which nobody asks for), once what gets no gradient, and
only the tokens that are computed where masks hide others. Elementwise work is left out: a chip's
peak is not made of it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jax.extend import core


def count(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> int:
  """Floating-point operations of all matrix products in a traced program.

  Scanned bodies count as often as they run, the dearer branch of a condition counts, and what
  rematerialisation computes again counts again: trace without it to get the model's FLOPs.

  Args:
    jaxpr: of `jax.make_jaxpr(f)(*args)`, or the `jaxpr` of `jax.jit(f).trace(*args)`.

  Returns:
    The sum over all devices, whatever the mesh.

  Raises:
    ValueError: a matrix product in a loop of unknown length.
  """
  jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name in ("dot_general", "conv_general_dilated"):
    if not np.issubdtype(equation.outvars[0].aval.dtype, np.integer):
      return _PRODUCTS[name](equation)
    return 0
  inside = [count(inner) for inner in core.jaxprs_in_params(params)]
  if name == "cond":
    return max(inside)
  if name == "while" and any(inside):
    raise ValueError(
      "a matrix product lies in a while loop, whose length no shape tells; use lax.scan, or "
      "lax.fori_loop with bounds that are Python numbers"
    )
  return sum(inside) * _repetitions(name, params)


def _dot(equation: core.JaxprEqn) -> int:
  """2 x (elements of the result) x (length of what is summed over)."""
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(equation: core.JaxprEqn) -> int:
  """2 x (elements of the result) x (window x input channels of a group), padding counted too."""
  out_channels = equation.params["dimension_numbers"].rhs_spec[0]
  kernel = equation.invars[1].aval.shape
  window = math.prod(n for i, n in enumerate(kernel) if i != out_channels)
  return 2 * math.prod(equation.outvars[0].aval.shape) * window


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}


def _repetitions(name: str, params: dict[str, Any]) -> int:
  """How often a primitive runs the program inside it, over all devices."""
  if name == "scan":
    return params["length"]
  if name == "shard_map":  # its program is that of one device
    mesh = params["mesh"]
    return math.prod(mesh.shape[axis] for axis in params["newly_manual_axes"])
  if name == "pallas_call":
    return math.prod(params["grid_mapping"].grid)
  return 1
