"""A method of the caller's own: built, checked before anything compiles, and described.

`describe` tells one such method from another where a config cannot, so that a workdir is claimed by
the method that trains in it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from jepax.config import Run
from jepax.core import Batch, Features, LossOut, Method, Reconstruction, TrainState
from jepax.evals.predictor import retrieve
from jepax.masks.tokens import Masks
from jepax.methods.jepa import JEPA
from jepax.names import one_of
from jepax.pretrained import POOLS

COUPLINGS = ("", "statistics", "negatives")


def resolve(method: Method | Callable[[Run], Method], run: Run) -> Method:
  """The method itself, called for where it is a function of the run.

  Args:
    method: an object, or a function that makes one.
    run: what such a function is told.

  Raises:
    ValueError: it lacks a part of `jepax.core.Method`, or has one that can't work.
  """
  if isinstance(method, nn.Module):
    raise ValueError(
      f"method={type(method).__name__} is a flax module, not a method: give it as the encoder of "
      "one, such as jepax.methods.jepa.JEPA(encoder=...)"
    )
  if callable(method) and not isinstance(method, type) and not hasattr(method, "loss"):
    method = method(run)
  if isinstance(method, type):
    raise ValueError(
      f"method={method.__name__} is a class; give an object of it, or a function of a "
      "jepax.config.Run that returns one"
    )
  _check(method)
  return method


def _check(method: Any) -> None:
  """What can be seen without tracing."""
  name = type(method).__name__
  functions = [n for n, f in vars(Method).items() if inspect.isfunction(f) and n[0] != "_"]
  lacking = [n for n in [*inspect.get_annotations(Method), *functions] if not hasattr(method, n)]
  lacking += [n for n in functions if n not in lacking and not callable(getattr(method, n))]
  if lacking:
    raise ValueError(
      f"method={name} lacks {lacking} of the protocol jepax.core.Method; add them, or build a "
      "jepax.methods.jepa.JEPA of an encoder and a predictor of your own"
    )
  branches = method.branches
  texts = isinstance(branches, tuple) and all(isinstance(branch, str) for branch in branches)
  if not texts or not branches or len(set(branches)) < len(branches):
    raise ValueError(
      f"{name}.branches={branches!r} must name one or more sets of the encoder's weights, each "
      "once, such as ('target', 'online')"
    )
  one_of(method.pool, POOLS, where=f"{name}.pool")
  one_of(method.couples_batch, COUPLINGS, where=f"{name}.couples_batch")
  try:
    hash(method)
  except TypeError as error:
    raise ValueError(
      f"method={name} can't be hashed ({error}), as jit needs: make it and the samplers and views "
      "in it dataclasses with frozen=True, and their lists tuples"
    ) from error


def check_shapes(method: Method, state: TrainState, batch: Batch) -> bool:
  """Traces the method's functions, among them those first called after training.

  Args:
    method: the caller's.
    state, batch: shapes alone, as `jax.eval_shape` gives them.

  Returns:
    Whether the loss tells that of each sample, `LossOut.each`.

  Raises:
    ValueError: a loss or a carry that the step can't take, or features, weights or masks that the
      probes and the report can't.
  """
  name, key = type(method).__name__, jax.eval_shape(jax.random.key, 0)
  params, carry = state.params, state.carry
  rows = {**batch, "sample": jax.ShapeDtypeStruct(batch["image"].shape[:1], np.int32)}
  found = jax.eval_shape(method.loss, params, carry, rows, key, state.step)
  pair = isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], LossOut)
  if not pair or getattr(found[0], "shape", None) != ():
    raise ValueError(
      f"{name}.loss must return a scalar and a jepax.core.LossOut(carry, metrics), found "
      f"{jax.tree.map(_shape, found)}"
    )
  metrics, each = found[1].metrics, found[1].each
  if not isinstance(metrics, Mapping) or any(
    not isinstance(key, str) or getattr(x, "shape", None) != () for key, x in metrics.items()
  ):
    raise ValueError(
      f"{name}.loss must give LossOut.metrics as a dict of scalars by name, "
      f"{{'group/name': f32[]}}; found {jax.tree.map(_shape, metrics)}"
    )
  if each is not None and getattr(each, "shape", None) != batch["image"].shape[:1]:
    raise ValueError(
      f"{name}.loss gives {jax.tree.map(_shape, each)} as LossOut.each, the loss of each of "
      f"{batch['image'].shape[0]} samples; leave it out where it can't be told"
    )
  moved = jax.eval_shape(method.update, params, found[1].carry, state.step)
  if jax.tree.map(_shape, moved) != jax.tree.map(_shape, carry):
    raise ValueError(
      f"{name}.update must return a carry like that of init, {jax.tree.map(_shape, carry)}, found "
      f"{jax.tree.map(_shape, moved)}"
    )
  for branch in method.branches:
    found = jax.eval_shape(functools.partial(method.encode, branch=branch), params, carry, batch)
    if not isinstance(found, Features) or (found.tokens.ndim, found.pooled.ndim) != (3, 2):
      raise ValueError(
        f"{name}.encode(branch={branch!r}) must return jepax.core.Features of tokens [b n d] and "
        f"pooled [b d], found {jax.tree.map(_shape, found)}"
      )
    weights = jax.eval_shape(functools.partial(method.weights, branch=branch), params, carry)
    if not isinstance(weights, Mapping):
      raise ValueError(
        f"{name}.weights(branch={branch!r}) must return a dict of arrays, found "
        f"{type(weights).__name__}"
      )
  if hasattr(method, "draw_masks"):
    masks = jax.eval_shape(method.draw_masks, key, batch)
    if not isinstance(masks, Masks) or not hasattr(method, "grid"):
      raise ValueError(
        f"{name}.draw_masks must return jepax.masks.Masks of the patches (rows, columns) in "
        f"{name}.grid, since the report shows a draw; name it otherwise where it is something else"
      )
  if hasattr(method, "reconstruct"):
    found = jax.eval_shape(method.reconstruct, params, carry, batch, key)
    if not isinstance(found, Reconstruction) or not hasattr(method, "grid"):
      raise ValueError(
        f"{name}.reconstruct must return a jepax.core.Reconstruction of the patches (rows, "
        f"columns) in {name}.grid, for the report; name it otherwise where it is something else"
      )
  if isinstance(method, JEPA):
    jax.eval_shape(functools.partial(retrieve, method), params, carry, batch["image"], key)
  return each is not None


def _shape(x: Any) -> str:
  """'float32[16, 8]'."""
  return f"{x.dtype}{list(x.shape)}"


# --- description ----------------------------------------------------------------------------


def describe(value: Any, *, inside: tuple[int, ...] = ()) -> Any:
  """What JSON can hold of an object, the same in every process.

  An object is its type and those of its fields that are not at their default; an array its hash; a
  function or class that a module holds is its name, since code is no more a part of this than a
  config has that of jepax. Lambdas and local functions, which no name tells apart, are the names,
  constants and outer variables in them.

  Args:
    value: anything.
    inside: ids of the objects that hold it, against circles.
  """
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if id(value) in inside:
    return "itself"
  inner = functools.partial(describe, inside=(*inside, id(value)))
  match value:
    case np.generic() | np.ndarray() | jax.Array():
      array = np.asarray(value)
      digest = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
      return array.item() if array.ndim == 0 else f"{array.dtype}{list(array.shape)} {digest}"
    case np.dtype() | bytes() | complex() | types.EllipsisType():
      return repr(value)
    case Mapping() | ConfigDict():
      return {str(key): inner(x) for key, x in value.items()}
    case list() | tuple():
      return [inner(x) for x in value]
    case set() | frozenset():
      return sorted(map(inner, value), key=repr)
    case functools.partial():
      return {"partial": inner(value.func), "args": inner(value.args), **inner(value.keywords)}
    case types.MethodType():
      return {"method": value.__name__, "of": inner(value.__self__)}
    case types.FunctionType():
      name = _name(value)
      return _local(value, name, inner) if "<" in name else name
  if hasattr(value, "__wrapped__"):  # by jax.jit
    return inner(value.__wrapped__)
  if hasattr(value, "__qualname__"):
    return _name(value)
  return {"type": _name(type(value)), **_fields(value, inner)}


def _name(value: Any) -> str:
  return f"{value.__module__}.{value.__qualname__}"


def _fields(value: Any, inner: Callable[[Any], Any]) -> dict[str, Any]:
  """Of a dataclass those that are not at their default, of another object all it holds."""
  if not dataclasses.is_dataclass(value):
    held = vars(value) if hasattr(value, "__dict__") else {}
    return inner({name: x for name, x in held.items() if not _is_cache(type(value), name)})
  found = {}
  for field in dataclasses.fields(value):
    if field.name == "parent":  # flax's own
      continue
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
      default = field.default_factory()
    described = inner(getattr(value, field.name))
    if default is dataclasses.MISSING or described != inner(default):
      found[field.name] = described
  return found


def _is_cache(kind: type, name: str) -> bool:
  return isinstance(inspect.getattr_static(kind, name, None), functools.cached_property)


def _local(function: Callable, name: str, inner: Callable[[Any], Any]) -> dict[str, Any]:
  """A function that no module holds under its name."""
  codes = list(_codes(function.__code__))
  constants = [c for code in codes for c in code.co_consts if not isinstance(c, types.CodeType)]
  outer = inspect.getclosurevars(function)
  plain = {k: x for k, x in outer.globals.items() if isinstance(x, bool | int | float | str)}
  return {
    "function": name,
    "names": sorted({n for code in codes for n in code.co_names}),
    "constants": [inner(c) for c in constants if c is not None and c != function.__doc__],
    "defaults": [inner(function.__defaults__), inner(function.__kwdefaults__)],
    "variables": inner({**plain, **outer.nonlocals}),
  }


def _codes(code: types.CodeType) -> Iterable[types.CodeType]:
  """This code and that of the functions in it."""
  yield code
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      yield from _codes(constant)
