"""What MAE makes of an image, to look at."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jepax import config as config_lib
from jepax.masks.tokens import gather
from jepax.methods.mae import MAE, patch_targets
from jepax.models.vit import patchify

RUN = config_lib.Run(
  size=tiny.SIZE, channels=1, mean=(0.5,), std=(0.25,), steps=10, dtype=jnp.float32
)
BATCH = {"image": tiny.images(4)}


def mae(**changes) -> MAE:
  return config_lib.build_method(dict(name="mae", **tiny.METHODS["mae"], **changes), RUN)


@dataclasses.dataclass(frozen=True)
class Oracle:
  """A decoder that knows the images."""

  method: MAE

  def apply(self, _params: Any, _x: jax.Array, _visible, hidden, *, grid):
    assert grid == (4, 4)
    patches = patchify(self.method.views.clean(BATCH["image"]), patch=4)
    return patch_targets(gather(patches, hidden), normalize=self.method.normalize_patches)


def reconstruct(method: MAE, decoder: Any = None):
  params, carry = jax.jit(method.init)(jax.random.key(0), BATCH)
  method = method if decoder is None else dataclasses.replace(method, decoder=decoder)
  return jax.jit(method.reconstruct)(params, carry, BATCH, jax.random.key(1))


def pixels_masked(found) -> np.ndarray:
  """Whether each pixel is hidden, bool[b h w 1]."""
  grid = np.asarray(found.is_masked).reshape(-1, 4, 4)
  return grid.repeat(4, 1).repeat(4, 2)[..., None]


def test_visible_patches_are_the_image():
  method, image = mae(), BATCH["image"]
  found = reconstruct(method)
  pixels, masked = np.asarray(found.pixels), pixels_masked(found)
  assert pixels.shape == image.shape and pixels.min() >= 0 and pixels.max() <= 1
  np.testing.assert_array_equal(found.is_masked.sum(1), method.masks.target_size)
  levels = np.rint(255 * pixels)
  np.testing.assert_array_equal(levels[~masked], image[~masked])
  assert np.mean(levels[masked] != image[masked]) > 0.9  # an untrained decoder's


@pytest.mark.parametrize("normalize", [True, False])
def test_a_perfect_prediction_is_the_image(normalize):
  method = mae(normalize_patches=normalize)
  found = reconstruct(method, Oracle(method))
  assert found.is_masked.any()
  # Six roundings of float32 at values up to 2, and 1 / sqrt(x) times sqrt(x).
  np.testing.assert_allclose(found.pixels, BATCH["image"] / np.float32(255), atol=2e-6)


def test_standardised_patches_get_the_mean_and_spread_of_the_true_ones():
  """And nothing else of them: a prediction of zeros is each hidden patch's mean."""
  method = mae()

  class Zeros:
    def apply(self, _params, _x, _visible, hidden, *, grid):
      return jnp.zeros((*hidden.index.shape, 16))

  found = reconstruct(method, Zeros())
  cut = functools.partial(patchify, patch=4)
  made, true = cut(found.pixels), cut(BATCH["image"] / np.float32(255))
  masked = np.asarray(found.is_masked)
  means = np.broadcast_to(np.asarray(true.mean(-1, keepdims=True)), true.shape)
  np.testing.assert_allclose(np.asarray(made)[masked], means[masked], atol=1e-6)
