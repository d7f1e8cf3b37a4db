"""What JEPA predicts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from jepax import config as config_lib

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
