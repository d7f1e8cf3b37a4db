"""Frozen encoders: preprocessing, pooling, layers, and the random control."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jepax.models.vit import ViT, sincos2d
from jepax.pretrained import Encoder, Preprocess, _cells

MODULE = ViT(patch=4, width=16, depth=2, heads=2, mlp_width=24, class_token=True)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def encoder():
  image = jnp.zeros((1, 8, 8, 3))
  params = MODULE.init(jax.random.key(3), image)["params"]
  return Encoder(
    module=MODULE, params=params, preprocess=Preprocess(size=(8, 8), mean=MEAN, std=STD), name="x"
  )


def test_preprocess_is_pillows_resize_and_a_middle_crop():
  photo = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)
  straight = Preprocess(size=(16, 24), mean=MEAN, std=STD, interpolation="bicubic").image(photo)
  wanted = Image.fromarray(photo).resize((24, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(straight, np.asarray(wanted))

  cropped = Preprocess(size=(16, 16), resize=20, mean=MEAN, std=STD).image(photo)
  wanted = Image.fromarray(photo).resize((27, 20), Image.Resampling.BILINEAR).crop((5, 2, 21, 18))
  np.testing.assert_array_equal(cropped, np.asarray(wanted))

  grey = Preprocess(size=(30, 41), mean=(0.5,), std=(0.2,)).image(photo)
  np.testing.assert_array_equal(grey[..., 0], np.asarray(Image.fromarray(photo).convert("L")))


def test_encoder_takes_arrays_and_photos_of_any_size(encoder):
  rng = np.random.default_rng(1)
  photo, grey = rng.integers(0, 256, (8, 8, 3), np.uint8), rng.integers(0, 256, (8, 8), np.uint8)
  features = encoder([photo, Image.fromarray(photo).resize((50, 60)), Image.fromarray(grey)])
  assert features.tokens.shape == (3, 4, 16) and encoder.grid == (2, 2)
  x = (photo / 255 - np.asarray(MEAN)) / np.asarray(STD)
  tokens = MODULE.apply({"params": encoder.params}, x[None].astype(np.float32))
  np.testing.assert_allclose(features.tokens[0], tokens[0, 1:], atol=1e-5)  # float32 rounding
  np.testing.assert_allclose(features.pooled[0], tokens[0, 1:].mean(0), atol=1e-5)
  layers = encoder.layers(photo[None], last=2)
  np.testing.assert_allclose(layers[-1], tokens, atol=1e-5)
  assert np.abs(layers[0] - layers[1]).max() > 1e-2


def test_class_token_pool(encoder):
  photo = np.zeros((1, 8, 8, 3), np.uint8)
  by_class = Encoder(**{**vars(encoder), "pool": "class"})
  np.testing.assert_array_equal(
    by_class.features(photo).pooled, by_class.layers(photo, last=1)[0, :, 0]
  )
  with pytest.raises(ValueError, match="pool='class' needs"):
    Encoder(**{**vars(encoder), "module": MODULE.clone(class_token=False), "pool": "class"})


def test_random_control(encoder):
  control = encoder.random(3)
  assert control.name == "random_init"
  jax.tree.map(  # one is compiled, the other not: one unit in the last place
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), control.params, encoder.params
  )
  other = encoder.random(4)
  assert np.abs(other.params["embed"]["kernel"] - encoder.params["embed"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
  "shape, dtype, message",
  [
    ((8, 8, 3), np.uint8, r"u8\[b h w c\], found shape \[8, 8, 3\]; give one image as"),
    ((0, 8, 8, 3), np.uint8, "no images"),
    ((2, 8, 8, 2), np.uint8, "c 1 or 3, found"),
  ],
)
def test_images_that_would_be_misread_are_refused(encoder, shape, dtype, message):
  with pytest.raises(ValueError, match=message):
    encoder(np.zeros(shape, dtype))


@pytest.mark.parametrize("shape, dtype", [((2, 4, 8, 3), np.uint8), ((2, 8, 8, 3), np.float32)])
def test_prepared_images_have_the_encoders_size(encoder, shape, dtype):
  images = np.zeros(shape, dtype)
  for call in (
    lambda: encoder.features(images),
    lambda: encoder.layers(images, last=1),
    lambda: encoder.kinds(images, ("pooled",)),
  ):
    with pytest.raises(ValueError, match=r"u8\[b 8 8 3\], found .*`prepare`"):
      call()


def test_bad_images_and_settings(encoder):
  with pytest.raises(ValueError, match=r"c 1 or 3, found float32\[8, 8, 3\]"):
    encoder([np.zeros((8, 8, 3), np.float32)])
  with pytest.raises(ValueError, match="resize=4 must be at least"):
    Preprocess(size=(8, 8), resize=4, mean=MEAN, std=STD)
  with pytest.raises(ValueError, match=r"interpolation.*bilinaer"):
    Preprocess(size=(8, 8), mean=MEAN, std=STD, interpolation="bilinaer")


def test_spatial_features_are_means_of_cells():
  tokens = np.random.default_rng(2).normal(size=(2, 7 * 4, 5)).astype(np.float32)
  found = np.asarray(_cells(tokens, 7)).reshape(2, 3, 3, 5)
  x = tokens.reshape(2, 7, 4, 5)
  np.testing.assert_allclose(found[:, 0, 0], x[:, 0:3, 0:2].mean((1, 2)), atol=1e-6)
  np.testing.assert_allclose(found[:, 1, 2], x[:, 2:5, 2:4].mean((1, 2)), atol=1e-6)
  np.testing.assert_allclose(found[:, 2, 1], x[:, 4:7, 1:3].mean((1, 2)), atol=1e-6)


def test_the_random_control_keeps_a_frozen_position_table(encoder):
  """A sin-cos table among the weights was never trained; another one was."""
  module = MODULE.clone(position="learned", grid=(2, 2))
  table = np.concatenate([np.zeros((1, 16)), sincos2d((2, 2), 16)]).astype(np.float32)
  for position, kept in ((table, True), (table + 0.1, False)):
    held = dataclasses.replace(
      encoder, module=module, params={**encoder.params, "position": position}
    )
    found = held.random(0).params["position"]
    assert np.array_equal(found, position) == kept
