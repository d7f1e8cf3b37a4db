"""Transformer blocks, pre-norm or post-norm, unrolled or scanned over depth."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from jepax.models.activations import ACTIVATIONS
from jepax.models.attention import IMPLEMENTATIONS, attention, fused
from jepax.models.norms import LayerNorm
from jepax.models.product import product
from jepax.names import one_of
from jepax.sharding import constrain, fsdp_parts, platform, regroup, tensor_parts

INITS: dict[str, Callable[..., jax.Array]] = {
  "normal": nn.initializers.normal(0.02),  # I-JEPA: its truncation at +-2 is absolute, so none
  "xavier": nn.initializers.xavier_uniform(),  # MAE
}
REMAT: dict[str, Callable | None] = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


def layer_norm(owner: nn.Module, name: str, dtype: jnp.dtype) -> LayerNorm:
  """LayerNorm with its owner's epsilon; statistics in float32, output in `dtype`."""
  return LayerNorm(epsilon=owner.norm_epsilon, dtype=dtype, name=name)


def dense(owner: nn.Module, width: int, *, name: str) -> nn.Dense:
  """A linear layer to `width` units with its owner's compute dtype and initialisation."""
  init = INITS[owner.init_name]
  return nn.Dense(width, dtype=owner.dtype, kernel_init=init, dot_general=product, name=name)


class Grouped(nn.Module, kw_only=True):
  """Linear layers of equal width, whose parameters lie side by side.

  groups: layers; units: outputs of each; the rest as in `Stack`.
  """

  groups: int
  units: int
  init_name: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
    """x: [b n d] -> `groups` arrays [b n units], their last axis split over `tensor`."""
    shape = (x.shape[-1], self.groups * self.units)
    kernel = self.param("kernel", INITS[self.init_name], shape)
    bias = self.param("bias", nn.initializers.zeros, shape[1:])
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    if tensor_parts() == 1:
      contracting = (((2,), (0,)), ((), ()))
      # A GPU's kernels take and give whole arrays: parts of one product would be copied. Where fsdp
      # cuts the kernel its pieces don't end at q, k and v, so their parts would change devices.
      if platform() == "gpu" and fsdp_parts() == 1:
        pairs = zip(*(jnp.split(p, self.groups, axis=-1) for p in (kernel, bias)), strict=True)
        parts = [product(x, kernel, contracting) + bias for kernel, bias in pairs]
      else:
        parts = jnp.split(product(x, kernel, contracting) + bias, self.groups, axis=-1)
      return tuple(constrain(part, split=-1) for part in parts)
    kernel, bias = regroup(kernel, groups=self.groups), regroup(bias, groups=self.groups)
    y = constrain(jnp.tensordot(x, kernel, 1) + bias, split=-1)  # [b n groups units]
    return tuple(y[:, :, group] for group in range(self.groups))


def grouped(owner: nn.Module, groups: int, units: int, *, name: str) -> Grouped:
  """`groups` linear layers to `units` units each, see `dense`."""
  return Grouped(
    groups=groups, units=units, init_name=owner.init_name, dtype=owner.dtype, name=name
  )


class Block(nn.Module, kw_only=True):
  """x + attention(norm(x)), then x + mlp(norm(x)); the residual stream keeps x's dtype.

  norms: 'pre', as above, or 'post': norm(x + attention(x)), then norm(x + mlp(x)) (data2vec 2.0).
  heads: attention heads; mlp_width: hidden units (with 'swiglu', of each of its two halves);
  layer_scale: initial value of a learned factor a channel on both branches, None for no factor;
  keep: return only the last `keep` tokens (the others still serve as keys and values), None for
  all. padding: first tokens that stand for none (see `Transformer`) and are not sown. Queries and
  keys [b n h e] are sown into the collection 'intermediates', for attention maps, and what the MLP
  adds to the residual stream, before scaling, [b n d], into 'mlp' (`mlp_outputs`).
  A branch of a sample is dropped at the given rate where an rng stream 'drop_path' is passed.
  """

  heads: int
  mlp_width: int
  activation: str = "gelu"
  init_name: str = "normal"
  attention: str = "auto"
  dtype: jnp.dtype = jnp.float32
  layer_scale: float | None = None
  norm_epsilon: float = 1e-6
  norms: str = "pre"
  keep: int | None = None
  padding: int = 0

  @nn.compact
  def __call__(
    self, x: jax.Array, valid: jax.Array | None, drop_rate: jax.Array | float = 0.0
  ) -> jax.Array:
    """x: [b n d], valid: bool[b n] or None, drop_rate: in [0, 1) -> [b n d], or [b keep d]."""
    d, post = x.shape[-1], self.norms == "post"
    norms = [layer_norm(self, n, x.dtype if post else self.dtype) for n in ("norm1", "norm2")]
    x = constrain(x)
    qkv = grouped(self, 3, d, name="qkv")(x if post else norms[0](x))
    q, k, v = (constrain(rearrange(y, "b n (h e) -> b n h e", h=self.heads), split=2) for y in qkv)
    if self.keep is not None:
      q, x = q[:, -self.keep :], x[:, -self.keep :]
    self.sow("intermediates", "query", q[:, self.padding :])
    self.sow("intermediates", "key", k[:, self.padding :])
    y = attention(q, k, v, valid=valid, implementation=self.attention)
    y = dense(self, d, name="proj")(rearrange(y, "b n h e -> b n (h e)"))
    x = constrain(x + self._branch(y, drop_rate, "scale1").astype(x.dtype))
    x = norms[0](x) if post else x
    groups = 2 if self.activation == "swiglu" else 1
    fc1 = grouped(self, groups, self.mlp_width, name="fc1")
    y = dense(self, d, name="fc2")(ACTIVATIONS[self.activation](*fc1(x if post else norms[1](x))))
    self.sow("mlp", "out", y[:, self.padding :])
    x = x + self._branch(y, drop_rate, "scale2").astype(x.dtype)
    return norms[1](x) if post else x

  def _branch(self, y: jax.Array, drop_rate: jax.Array | float, name: str) -> jax.Array:
    """What the residual stream gets of a branch: scaled, and dropped for some samples."""
    if self.layer_scale is not None:
      y = y * self.param(name, nn.initializers.constant(self.layer_scale), y.shape[-1:])
    if self.has_rng("drop_path"):
      kept = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_rate, (y.shape[0], 1, 1))
      y = y * (kept / (1 - drop_rate))
    return y


class Stack(nn.Module, kw_only=True):
  """The fields of a `Transformer`, and so of every module that holds one.

  width, depth, heads: sizes; mlp_width: hidden units of the MLPs, None for 4 * width.
  activation, init_name, attention, remat: names, see ACTIVATIONS, INITS, REMAT and
  `models.attention`. dtype: of matrix products; parameters and the residual stream are float32.
  scan: one traced block over stacked parameters `blocks` [depth ...] (deep models compile fast)
  instead of `block0`, `block1`, ... (small models run faster). remat: what the backward pass
  recomputes, 'none', 'dots' (all but matrix products) or 'full'. layer_scale: see `Block`.
  norm_epsilon: of every norm. norms: see `Block`. drop_path: rate of the last block, growing
  linearly from 0 at the first, or with drop_path_shape='uniform' that of every block; it acts where
  an rng stream of that name is passed, so in training that asks for it alone.

  Raises:
    ValueError: an unknown name, a size below 1, or a width that the heads don't divide.
  """

  width: int
  depth: int
  heads: int
  mlp_width: int | None = None
  activation: str = "gelu"
  init_name: str = "normal"
  attention: str = "auto"
  dtype: jnp.dtype = jnp.float32
  layer_scale: float | None = None
  norm_epsilon: float = 1e-6
  norms: str = "pre"
  drop_path: float = 0.0
  drop_path_shape: str = "linear"
  scan: bool = False
  remat: str = "none"

  def __post_init__(self):
    one_of(self.activation, ACTIVATIONS, where="activation")
    one_of(self.init_name, INITS, where="init_name")
    one_of(self.attention, IMPLEMENTATIONS, where="attention")
    one_of(self.remat, REMAT, where="remat")
    one_of(self.norms, ("pre", "post"), where="norms")
    one_of(self.drop_path_shape, ("linear", "uniform"), where="drop_path_shape")
    for name in ("width", "depth", "mlp_width"):
      size = getattr(self, name)
      if size is not None and size < 1:
        raise ValueError(f"{name} must be at least 1, found {size}")
    if not self.norm_epsilon > 0:
      raise ValueError(f"norm_epsilon must be above 0, found {self.norm_epsilon}")
    if self.heads < 1 or self.width % self.heads:
      raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
    if not 0 <= self.drop_path < 1:
      raise ValueError(f"drop_path must lie in [0, 1), found {self.drop_path}")
    super().__post_init__()


class Transformer(Stack):
  """A stack of blocks, without a final norm.

  Where cuDNN serves, an odd number of tokens gets one in front that nothing attends to.
  """

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    valid: jax.Array | None = None,
    *,
    keep: int | None = None,
    last: int | None = None,
  ) -> jax.Array:
    """Runs the blocks.

    Args:
      x: [b n width].
      valid: bool[b n], tokens to attend to; None for all.
      keep: return only the last `keep` tokens, and spare the last block the others.
      last: return the outputs of the last `last` blocks instead of the last one's.

    Returns:
      [b n width], or [b keep width]; with `last`, [last b n width].

    Raises:
      ValueError: `last` beyond the depth, or together with `keep`.
    """
    if last is not None and (keep is not None or not 1 <= last <= self.depth):
      raise ValueError(f"last must lie in 1..{self.depth}, without keep; found {last}, keep={keep}")
    even = fused(self.attention, dtype=self.dtype, head_width=self.width // self.heads)
    padding = x.shape[1] % 2 if even else 0
    if padding:  # here rather than in each block, where queries, keys and values would be copied
      valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
      x, valid = jnp.pad(x, ((0, 0), (1, 0), (0, 0))), jnp.pad(valid, ((0, 0), (1, 0)))
    block = self._block(padding)
    if self.scan:
      x, outputs = self._scanned(block(name="blocks"), x, valid, last is not None)
      outputs = outputs if last is None else outputs[-last:]
    else:
      outputs = []
      for i, rate in enumerate(self._drop_rates()):
        kept = None if keep is None or i < self.depth - 1 else keep + (keep % 2 if even else 0)
        x = block(keep=kept, name=f"block{i}")(x, valid, rate)
        outputs.append(x)
      outputs = outputs if last is None else jnp.stack(outputs[-last:])
    if last is not None:
      return outputs[:, :, padding:]
    return x[:, padding:] if keep is None else x[:, -keep:]

  def _drop_rates(self) -> list[float]:
    first = self.drop_path if self.drop_path_shape == "uniform" else 0
    return np.linspace(first, self.drop_path, self.depth).tolist()

  def _block(self, padding: int) -> Callable[..., Block]:
    block = Block
    if self.remat != "none":
      block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
    return functools.partial(
      block,
      heads=self.heads,
      mlp_width=self.mlp_width or 4 * self.width,
      activation=self.activation,
      init_name=self.init_name,
      attention=self.attention,
      dtype=self.dtype,
      layer_scale=self.layer_scale,
      norm_epsilon=self.norm_epsilon,
      norms=self.norms,
      padding=padding,
    )

  def _scanned(self, block: Block, x: jax.Array, valid: jax.Array | None, collect: bool):
    """The last block's output, and all of them [depth b n d] if they are to be collected."""

    def step(block, x, rate):
      x = constrain(block(x, valid, rate))
      return x, x if collect else None

    body = nn.scan(
      step,
      variable_axes={"params": 0, "intermediates": 0, "mlp": 0},
      split_rngs={"params": True, "drop_path": True},
      length=self.depth,
    )
    return body(block, x, jnp.asarray(self._drop_rates()))


def transformer(owner: Stack) -> Transformer:
  """The blocks of a module that shares their fields, under the name 'transformer'."""
  names = {f.name for f in dataclasses.fields(Stack)} - {"parent", "name"}
  return Transformer(**{name: getattr(owner, name) for name in names}, name="transformer")


def mlp_outputs(collection: Mapping[str, Any], *, depth: int, last: int) -> list[jax.Array]:
  """What the MLPs of the last blocks added to the residual stream.

  Args:
    collection: 'mlp' of an encoder applied with mutable=['mlp'].
    depth: blocks of its transformer.
    last: how many blocks, counted from the end.

  Returns:
    `last` arrays [b n d], the deepest last.
  """
  sown = collection["transformer"]
  if "blocks" in sown:  # a scanned stack, [depth b n d]
    return list(sown["blocks"]["out"][0][-last:])
  return [sown[f"block{i}"]["out"][0] for i in range(depth - last, depth)]
