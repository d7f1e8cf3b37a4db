"""Weights in memory: an encoder in one or more sets, what belongs to it, and where it came from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jepax.convert import positions as position_tables
from jepax.convert.rules import SAME_TABLE, Flat
from jepax.masks.tokens import TokenSet
from jepax.models import encoder as encoders
from jepax.models.convnext import ConvNeXt
from jepax.models.decoder import PixelDecoder
from jepax.models.predictor import Predictor
from jepax.models.resnet import ResNet
from jepax.models.vit import ViT
from jepax.names import one_of
from jepax.pretrained import Encoder, Preprocess

Grid = tuple[int, int]
STACKED = "transformer/blocks/"  # where a scanned stack has its blocks, along a first axis


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Part:
  """A network that comes with an encoder: its module and its parameters, flat."""

  module: Predictor | PixelDecoder
  params: Flat


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
  """What any source holds, in jepax's terms.

  module: the encoder, its blocks not stacked. branches: name -> its weights (`models.encoder`),
  flat; the first is the one to use. parts: 'predictor', 'decoder', where the source has them.
  preprocess, pool: as `pretrained.Encoder`. facts: settings of pre-training that the source states.
  origin: 'path', 'format' and 'sha256' of the source, and 'origin', its own, where it says so.
  """

  module: nn.Module
  branches: dict[str, Flat]
  preprocess: Preprocess
  pool: str
  origin: dict[str, Any]
  parts: dict[str, Part] = dataclasses.field(default_factory=dict)
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def channels(self) -> int:
    return len(self.preprocess.mean)

  def only(self, branch: str) -> Weights:
    """These weights with one set of the encoder alone."""
    one_of(branch, self.branches, where="branch")
    return dataclasses.replace(self, branches={branch: self.branches[branch]}, parts={}, facts={})

  def encoder(self, branch: str | None = None) -> Encoder:
    """The function images -> Features, with one set of weights; the first by default."""
    name = next(iter(self.branches)) if branch is None else branch
    one_of(name, self.branches, where="branch")
    origin = "{path} ({format}, sha256 {sha256})".format(**self.origin)
    return Encoder(
      module=self.module,
      params=jax.tree.map(jnp.asarray, unflatten(self.branches[name])),
      preprocess=self.preprocess,
      name=name,
      pool=self.pool,
      origin=origin,
    )

  def at(self, *, size: int | None = None, positions: str | None = None) -> Weights:
    """These weights for images of `size`, with positions to match.

    Args:
      size: pixels a side; None for the size of the preprocessing.
      positions: 'interpolate' the table as Hugging Face does, or 'recompute' it, which only
        sin-cos tables can be; None where the grid of patches stays as it is.

    Raises:
      ValueError: another grid than that of the weights without a choice, a size that doesn't
        divide into patches, recomputing a table that was learned, or a choice of positions where
        there are none.
    """
    if positions is not None:
      one_of(positions, position_tables.CHOICES, where="positions")
    native = self.module.grid or self._grid(self.preprocess)
    preprocess = self.preprocess if size is None else _resized(self.preprocess, size)
    grid = self._grid(preprocess)
    if self.module.position == "none":
      if positions is not None:
        raise ValueError(f"this encoder has no positions to {positions}; leave out that choice")
      return dataclasses.replace(self, preprocess=preprocess)
    if positions is None and grid != native:
      own = " x ".join(str(n * self.module.patch) for n in native)
      raise ValueError(
        f"these weights have positions for a grid of {native} patches ({own} pixels), and images "
        f"of {preprocess.size} pixels make {grid}. Choose positions='interpolate' (bicubic, as "
        "Hugging Face) or positions='recompute' (sin-cos tables only), or the size of the weights."
      )
    changed = dataclasses.replace(self, preprocess=preprocess)
    if positions == "recompute":
      return changed._recomputed(native)
    return changed if grid == native else changed._interpolated(native, grid)

  def tabled(self) -> Weights:
    """The same encoders with their position table among the parameters, sin-cos ones too."""
    if self.module.position == "learned":
      return self
    grid = self._grid(self.preprocess)
    table = self._sincos(grid)
    return dataclasses.replace(
      self,
      module=self.module.clone(position="learned", grid=grid),
      branches={name: {**params, "position": table} for name, params in self.branches.items()},
    )

  def _grid(self, preprocess: Preprocess) -> Grid:
    patch = self.module.patch
    if any(n % patch for n in preprocess.size):
      raise ValueError(f"images of {preprocess.size} pixels do not divide into patches of {patch}")
    return tuple(n // patch for n in preprocess.size)

  def _sincos(self, grid: Grid) -> np.ndarray:
    return position_tables.sincos_table(
      grid, self.module.width, class_token=self.module.class_token
    )

  def _interpolated(self, old: Grid, new: Grid) -> Weights:
    first, branches = int(self.module.class_token), {}
    for name, params in self.branches.items():
      table = params["position"] if self.module.position == "learned" else self._sincos(old)
      patches = position_tables.interpolate(
        table[first:], old=old, new=new, antialias=self.module.registers > 0
      )
      branches[name] = {**params, "position": np.concatenate([table[:first], patches])}
    module = self.module.clone(position="learned", grid=new)
    return dataclasses.replace(self, module=module, branches=branches)

  def _recomputed(self, native: Grid) -> Weights:
    if self.module.position == "sincos":
      return self
    branches, wanted = {}, self._sincos(native)
    for name, params in self.branches.items():
      gap = float(np.abs(params["position"] - wanted).max())
      if gap > SAME_TABLE:
        raise ValueError(
          f"the positions of {name!r} are no sin-cos table (they differ by up to {gap:.2g}), so "
          "they can't be recomputed; choose positions='interpolate'"
        )
      branches[name] = {path: x for path, x in params.items() if path != "position"}
    module = self.module.clone(position="sincos", grid=None)
    return dataclasses.replace(self, module=module, branches=branches)


def _resized(preprocess: Preprocess, size: int) -> Preprocess:
  """The same preprocessing for squares of another size; a middle crop keeps its share."""
  height, width = preprocess.size
  if height != width:
    raise ValueError(f"size={size} is for squares; these weights take images of {preprocess.size}")
  resize = None if preprocess.resize is None else round(preprocess.resize * size / height)
  return dataclasses.replace(preprocess, size=(size, size), resize=resize)


# --- parameters -----------------------------------------------------------------------------


def flatten(params: Mapping[str, Any]) -> Flat:
  """{'embed': {'kernel': x}} -> {'embed/kernel': x}; stacked blocks become block0, block1, ..."""
  flat = {path: np.asarray(x) for path, x in flatten_dict(params, sep="/").items()}
  out = {path: x for path, x in flat.items() if not path.startswith(STACKED)}
  for path in flat.keys() - out.keys():
    name = path.removeprefix(STACKED)
    out |= {f"transformer/block{i}/{name}": x for i, x in enumerate(flat[path])}
  return dict(sorted(out.items()))


def stacked(flat: Flat) -> Flat:
  """The same with block0, block1, ... along a first axis, as a scanned stack has them."""
  out, blocks = {}, {}
  for path, x in flat.items():
    match = re.fullmatch(r"transformer/block(\d+)/(.+)", path)
    if match is None:
      out[path] = x
    else:
      blocks.setdefault(match[2], {})[int(match[1])] = x
  for name, layers in blocks.items():
    out[STACKED + name] = np.stack([layers[i] for i in range(len(layers))])
  return dict(sorted(out.items()))


def unflatten(flat: Flat) -> dict[str, Any]:
  """The tree again, its blocks not stacked."""
  return unflatten_dict(flat, sep="/")


def prefixed(name: str, flat: Mapping[str, Any]) -> dict[str, Any]:
  """The same leaves under 'NAME/'."""
  return {f"{name}/{path}": x for path, x in flat.items()}


def under(name: str, flat: Mapping[str, Any]) -> dict[str, Any]:
  """The leaves under 'NAME/', without it."""
  return {p.removeprefix(f"{name}/"): x for p, x in flat.items() if p.startswith(f"{name}/")}


def shapes(module: nn.Module, *, channels: int, width: int | None = None) -> dict[str, tuple]:
  """path -> shape of a module's weights, computing nothing.

  Args:
    module: an encoder, Predictor or PixelDecoder.
    channels: of the encoder's images.
    width: d of the encoder whose output a predictor or decoder reads.
  """
  one = TokenSet(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
  if isinstance(module, (ViT, ResNet, ConvNeXt)):
    side = [n * module.patch for n in module.grid or (1, 1)]
    image = jnp.zeros((1, *side, channels))
    tree = jax.eval_shape(lambda key: encoders.init(module, key, image), jax.random.key(0))
    return _shapes(tree)
  if isinstance(module, Predictor):
    targets = TokenSet(one.index[None], one.valid[None])
    arguments = (jnp.zeros((1, 1, width)), one, targets)
  else:
    arguments = (jnp.zeros((1, 2, width)), one, one)
  tree = jax.eval_shape(lambda key: module.init(key, *arguments, grid=(1, 1)), jax.random.key(0))
  return _shapes(tree["params"])


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple]:
  return {path: x.shape for path, x in flatten_dict(tree, sep="/").items()}
