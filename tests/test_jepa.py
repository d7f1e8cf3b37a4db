"""What JEPA predicts."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

import jepax.masks
from jepax import config as config_lib
from jepax.masks import MultiBlock, Random

RUN = config_lib.Run(
  size=tiny.SIZE, channels=1, mean=(0.5,), std=(0.25,), steps=10, dtype=jnp.float32
)


def ijepa(**changes):
  return config_lib.build_method(dict(name="ijepa", **tiny.METHODS["ijepa"], **changes), RUN)


class Nothing(nn.Module):
  """A predictor of zeros, so that the loss is of the targets alone."""

  @nn.compact
  def __call__(self, context, visible, hidden, *, grid):
    return jnp.zeros((*hidden.index.shape, context.shape[-1]))


@pytest.mark.parametrize(
  ("name", "axis"), [("layer_norm", -1), ("instance_norm", -2), ("none", None)]
)
def test_target_norm(name, axis):
  """The target encoder's tokens, normalised as the config says, at the hidden patches."""
  method, batch = ijepa(objective="mse", target_norm=name), {"image": tiny.images(8)}
  params, carry = jax.jit(method.init)(jax.random.key(0), batch)
  carry = jax.tree.map(lambda p: 1.5 * p + 0.2, carry)  # else its last LN makes all three alike
  key = jax.random.key(1)
  alone = dataclasses.replace(method, predictor=Nothing())
  loss, _ = jax.jit(alone.loss)({**params, "predictor": {}}, carry, batch, key, 0)
  x = np.asarray(method.encode(params, carry, batch, branch="target").tokens, np.float64)
  if axis is not None:
    x = (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)
  targets = jax.jit(method.draw_masks)(jax.random.split(key)[1], batch).targets
  pair = targets.index, targets.valid
  of_sets = [
    np.square(x[i, index[valid]]).mean()
    for i, (rows, valids) in enumerate(zip(*map(np.asarray, pair), strict=True))
    for index, valid in zip(rows, valids, strict=True)
  ]
  np.testing.assert_allclose(loss, np.mean(of_sets), rtol=1e-4)  # float32 features


def test_an_unknown_target_norm():
  with pytest.raises(
    ValueError, match=r"target_norm='layer' is unknown; did you mean 'layer_norm'"
  ):
    ijepa(target_norm="layer")


# --- masks by name --------------------------------------------------------------------------


def masked(**section):
  return config_lib.build_method(
    dict(name="ijepa", **{**tiny.METHODS["ijepa"], "masks": section}), RUN
  )


def test_masks_are_blocks_unless_named():
  fields = tiny.METHODS["ijepa"]["masks"]
  assert masked(**fields).masks == masked(name="multiblock", **fields).masks
  assert masked(**fields).masks == MultiBlock(grid=(4, 4), **fields)


def test_random_masks_train():
  method, batch = masked(name="random", ratio=0.75), {"image": tiny.images(8)}
  assert method.masks == Random(tokens=16, ratio=0.75)
  params, carry = jax.jit(method.init)(jax.random.key(0), batch)
  graded = jax.jit(jax.value_and_grad(method.loss, has_aux=True))
  (loss, out), grads = graded(params, carry, batch, jax.random.key(1), 0)
  assert loss > 0 and all(np.any(leaf) for leaf in jax.tree.leaves(grads["encoder"]))
  assert (out.metrics["mask/context_tokens"], out.metrics["mask/target_tokens"]) == (4, 12)


@pytest.mark.parametrize(
  ("section", "message"),
  [
    (dict(name="randm"), "^method.masks.name='randm' is unknown; did you mean 'random'"),
    (dict(name="tokens"), r"allowed: \['crop_blocks', 'inverse_block', 'multiblock', 'random'\]"),
    (dict(name="random"), r"^method.masks lacks \['ratio'\]"),
    (dict(name="random", ratio=0.5, targets=2), "^method.masks.targets is unknown"),
    (dict(name="random", ratio=0.5, tokens=16), "^method.masks.tokens is decided by the run"),
    (dict(name="inverse_block"), r"^method.masks.name='inverse_block' .*\[b, 1, 3\] .*\[b k\]"),
    (dict(name="crop_blocks"), r"^method.masks.name='crop_blocks' draws contexts .*\[b, 2, 16\]"),
  ],
)
def test_masks_that_do_not_fit(section, message):
  with pytest.raises(ValueError, match=message):
    masked(**section)


SAMPLER = """
import dataclasses

import jax.numpy as jnp

from jepax.masks.tokens import Masks, first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halves:
  grid: tuple[int, int]
  upper: bool = True
  context_size = target_size = property(lambda self: self.grid[0] * self.grid[1] // 2)

  def __call__(self, keys, step_key):
    half, b = jnp.arange(self.context_size), len(keys)
    seen = jnp.broadcast_to(half + self.context_size * (not self.upper), (b, len(half)))
    hidden = jnp.broadcast_to(half + self.context_size * self.upper, (b, 1, len(half)))
    full = jnp.full((b, 1), len(half))
    return Masks(first(seen, full[:, 0]), first(hidden, full), jnp.zeros(b, bool))
"""


def test_a_new_sampler_is_a_file(tmp_path, monkeypatch):
  """And nothing else to edit."""
  (tmp_path / "halves.py").write_text(SAMPLER)
  monkeypatch.setattr(jepax.masks, "__path__", [*jepax.masks.__path__, str(tmp_path)])
  method = masked(name="halves", upper=False)
  masks = method.draw_masks(jax.random.key(0), {"image": tiny.images(2)})
  assert masks.context.index[0].tolist() == list(range(8, 16))
  with pytest.raises(ValueError, match="did you mean 'upper'"):
    masked(name="halves", uper=False)
  monkeypatch.delitem(sys.modules, "jepax.masks.halves")
