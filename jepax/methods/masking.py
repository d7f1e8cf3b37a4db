"""What the methods that hide tokens share: their encoder is a transformer, their masks samplers."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

import jax

import jepax.masks
from jepax.config import Run
from jepax.construct import construct, parameters
from jepax.masks.tokens import Masks
from jepax.models.encoder import CONVOLUTIONAL
from jepax.models.vit import VARIANTS, ViT, vit
from jepax.names import one_of


def build_vit(run: Run, encoder: Mapping[str, Any], **fixed: Any) -> ViT:
  """The encoder of a config's section `method.encoder`, arguments of `models.vit.vit`.

  Args:
    run: compute dtype.
    encoder: the section.
    **fixed: fields that the method decides.

  Raises:
    ValueError: a convolutional encoder, or anything `construct` refuses.
  """
  if "variant" in encoder and encoder["variant"] in CONVOLUTIONAL:
    raise ValueError(
      f"method.encoder.variant={encoder['variant']!r} is convolutional, and this method hides "
      f"tokens from its encoder: use a ViT, one of {list(VARIANTS)}, or a method that compares "
      "whole views, such as simclr"
    )
  return construct(vit, encoder, where="method.encoder", dtype=run.dtype, **fixed)


def samplers() -> dict[str, type]:
  """File of jepax/masks -> the sampler in it: its class that draws masks when called."""
  found = {}
  for file in pkgutil.iter_modules(jepax.masks.__path__):
    module = importlib.import_module(f"jepax.masks.{file.name}")
    for kind in vars(module).values():
      own = isinstance(kind, type) and kind.__module__ == module.__name__
      if own and hasattr(kind, "context_size") and "__call__" in vars(kind):
        found[file.name] = kind
  return found


def build_sampler(
  section: Mapping[str, Any], *, grid: tuple[int, int], default: str
) -> Callable[[jax.Array, jax.Array], Masks]:
  """The sampler of a config's section `method.masks`, for one context and its targets a sample.

  Args:
    section: `name`, a file of jepax/masks, and the fields of the sampler in it but grid or tokens.
    grid: patches (rows, columns) of an image.
    default: the name where the section has none.

  Raises:
    ValueError: an unknown name or key, a value that can't work, or a sampler that draws several
      contexts a sample.
  """
  arguments, known = dict(section), samplers()
  name = one_of(str(arguments.pop("name", default)), known, where="method.masks.name")
  taken = parameters(known[name])
  decided = {"grid": grid, "tokens": grid[0] * grid[1]}
  fixed = {key: value for key, value in decided.items() if key in taken}
  sampler = construct(known[name], arguments, where="method.masks", **fixed)
  if name == default:
    return sampler
  key = jax.eval_shape(jax.random.key, 0)
  masks = jax.eval_shape(sampler, jax.eval_shape(lambda k: jax.random.split(k, 1), key), key)
  ranks = masks.context.index.ndim, masks.targets.index.ndim
  if ranks != (2, 3):
    raise ValueError(
      f"method.masks.name={name!r} draws contexts of shape {_shape(masks.context)} and targets of "
      f"{_shape(masks.targets)}, and this method takes one context a sample, [b k], with m sets of "
      f"targets, [b m t], as {default!r} draws them"
    )
  return sampler


def _shape(tokens: Any) -> str:
  """'[b, 2, 16]'."""
  return f"[b, {', '.join(map(str, tokens.index.shape[1:]))}]"
