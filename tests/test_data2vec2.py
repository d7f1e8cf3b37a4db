"""data2vec 2.0 against a derivation of its own in numpy, float64, one token at a time."""

from __future__ import annotations

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import models_oracle as oracle
import numpy as np
import pytest
from flax import linen as nn

from jepax import config as config_lib
from jepax.masks.tokens import TokenSet
from jepax.methods import data2vec2
from jepax.models.decoder import ConvDecoder, grouped_conv
from jepax.models.transformer import Transformer, mlp_outputs

PATCH, GRID, WIDTH, HEADS, DEPTH = 2, (3, 3), 8, 2, 3
RUN = config_lib.Run(size=6, channels=1, mean=(0.5,), std=(0.25,), steps=10)
SETTINGS = dict(
  encoder=dict(variant="tiny", patch=PATCH, width=WIDTH, depth=DEPTH, heads=HEADS, mlp_width=12),
  decoder=dict(width=WIDTH, depth=2, groups=2),
  masks=dict(ratio=0.6, adjust=0.1, copies=2),
  views=dict(),
  layers=2,
  momentum=(0.5, 0.9),
  momentum_share=0.5,
  class_weight=0.3,
  noise=0.0,
)


def norm(x: np.ndarray, *, epsilon: float, axis: int = -1) -> np.ndarray:
  centred = x - x.mean(axis, keepdims=True)
  return centred / np.sqrt((centred**2).mean(axis, keepdims=True) + epsilon)


def affine(params, x: np.ndarray) -> np.ndarray:
  return norm(x, epsilon=1e-6) * params["scale"] + params["bias"]


def dense(params, x: np.ndarray) -> np.ndarray:
  return x @ params["kernel"] + params["bias"]


def block(params, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Post-norm: the block's output and what its MLP added; x [n d]."""
  q, k, v = np.split(dense(params["qkv"], x), 3, axis=-1)
  out = []
  for e in np.split(np.arange(WIDTH), HEADS):
    weights = np.exp(q[:, e] @ k[:, e].T / math.sqrt(len(e)))
    out.append(weights / weights.sum(1, keepdims=True) @ v[:, e])
  x = affine(params["norm1"], x + dense(params["proj"], np.concatenate(out, 1)))
  t = dense(params["fc2"], oracle.gelu(dense(params["fc1"], x)))
  return affine(params["norm2"], x + t), t


def encode(params, image: np.ndarray, ids) -> tuple[np.ndarray, list[np.ndarray]]:
  """Class token and the patches `ids`: the output, and what every MLP added."""
  rows = [params["class_token"][0, 0]]
  for i in ids:
    r, c = divmod(i, GRID[1])
    pixels = image[r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].ravel()
    rows.append(dense(params["embed"], pixels) + oracle.position(r, c, WIDTH))
  x, added = affine(params["embed_norm"], np.stack(rows)), []
  for i in range(DEPTH):
    x, t = block(params["transformer"][f"block{i}"], x)
    added.append(t)
  return x, added


def conv(params, x: np.ndarray, *, groups: int) -> np.ndarray:
  """3 x 3, zeros around; x [h w c]."""
  kernel, out = params["kernel"], []
  padded, size = np.pad(x, ((1, 1), (1, 1), (0, 0))), x.shape[-1] // groups
  for o in range(kernel.shape[-1]):
    g = o // (kernel.shape[-1] // groups)
    part = padded[..., g * size : (g + 1) * size]
    out.append(
      [
        [(part[i : i + 3, j : j + 3] * kernel[..., o]).sum() for j in range(x.shape[1])]
        for i in range(x.shape[0])
      ]
    )
  return np.moveaxis(np.array(out), 0, -1) + params["bias"]


def decode(params, visible: np.ndarray, ids) -> np.ndarray:
  x = np.zeros((GRID[0] * GRID[1], WIDTH))
  x[list(ids)] = visible
  x = x.reshape(*GRID, WIDTH)
  for i in range(2):
    x = x + oracle.gelu(norm(conv(params[f"conv{i}"], x, groups=2), epsilon=1e-5))
  return dense(params["proj"], x.reshape(-1, WIDTH))


def slow_loss(params, teacher, images: np.ndarray, contexts: np.ndarray) -> tuple[float, float]:
  """Regression and class loss; images normalised, contexts [b m k]."""
  regression, summary = [], []
  for image, sets in zip(images, contexts, strict=True):
    _, added = encode(teacher, image, range(9))
    layers = [norm(t[1:], epsilon=1e-5, axis=0) for t in added[-2:]]
    target = norm((layers[0] + layers[1]) / 2, epsilon=1e-5)
    for ids in sets:
      x, _ = encode(params["encoder"], image, ids)
      prediction = decode(params["decoder"], x[1:], ids)
      for i in set(range(9)) - set(ids.tolist()):
        regression.append(((prediction[i] - target[i]) ** 2).sum() / math.sqrt(WIDTH))
      summary.append(((x[0] - target.mean(0)) ** 2).sum() / math.sqrt(WIDTH))
  return float(np.mean(regression)), float(np.mean(summary))


@pytest.fixture(scope="module")
def start():
  """(method, params and carry moved apart at random, batch)."""
  method = data2vec2.build(RUN, **SETTINGS)
  images = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 1), dtype=np.uint8)
  batch = {"image": jnp.asarray(images)}
  state = jax.jit(method.init)(jax.random.key(0), batch)
  rng = np.random.default_rng(1)
  return method, *jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape), state), batch


def test_loss_is_the_slow_one(start):
  method, params, carry, batch = start
  key = jax.random.key(5)
  contexts = np.asarray(method.draw_masks(jax.random.split(key, 3)[1], batch).context.index)
  wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)  # noqa: E731
  images = (np.asarray(batch["image"], np.float64) / 255 - 0.5) / 0.25
  regression, summary = slow_loss(wide(params), wide(carry["target"]), images, contexts)
  loss, out = jax.jit(method.loss)(params, carry, batch, key, 0)
  # float32 through three blocks and two convolutions.
  np.testing.assert_allclose(out.metrics["loss/regression"], regression, rtol=1e-4)
  np.testing.assert_allclose(out.metrics["loss/class"], summary, rtol=1e-4)
  np.testing.assert_allclose(loss, regression + 0.3 * summary, rtol=1e-4)


def test_the_teacher_runs_once_for_all_masks(start):
  """Rows that go through the encoder: b of the teacher's, b * m of the student's."""
  method, params, carry, batch = start
  rows = []

  def record(call, values, named, context):
    if isinstance(context.module, Transformer) and context.method_name == "__call__":
      rows.append(values[0].shape)
    return call(*values, **named)

  with nn.intercept_methods(record):
    jax.eval_shape(method.loss, params, carry, batch, jax.random.key(0), 0)
  kept = method.masks.context_size
  assert rows == [(3, 10, WIDTH), (6, 1 + kept, WIDTH)]


def test_noise_is_fresh_and_small(start):
  method, params, carry, batch = start
  noisy = dataclasses.replace(method, noise=0.01)
  quiet, loud = (
    jax.jit(m.loss)(params, carry, batch, jax.random.key(5), 0)[0] for m in (method, noisy)
  )
  assert quiet != loud
  np.testing.assert_allclose(quiet, loud, rtol=0.05)


def test_momentum_reaches_its_end_after_its_share(start):
  method = start[0]
  np.testing.assert_allclose([method.momentum(s) for s in (0, 2.5, 5, 9)], [0.5, 0.7, 0.9, 0.9])


@pytest.mark.parametrize("scan", [False, True])
def test_mlp_outputs(scan):
  """Pre-norm, so that outputs are input plus all that was added: MLPs here, attention silenced."""
  model = Transformer(width=4, depth=3, heads=1, scan=scan)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
  params = model.init(jax.random.key(0), x)["params"]
  mute = lambda path, p: p * 0 if any(k.key == "proj" for k in path) else p + 0.1  # noqa: E731
  params = jax.tree_util.tree_map_with_path(mute, params)
  out, sown = model.apply({"params": params}, x, mutable=["mlp"])
  added = mlp_outputs({"transformer": sown["mlp"]}, depth=3, last=3)
  assert len(mlp_outputs({"transformer": sown["mlp"]}, depth=3, last=2)) == 2
  np.testing.assert_allclose(sum(added) + x, out, rtol=1e-5, atol=1e-5)


def test_grouped_convolution_on_a_cpu_is_laxs():
  """In value and gradients, on a grid that is not square."""
  x, kernel = (
    jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((2, 4, 5, 6), (3, 3, 2, 9)))
  )
  options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3)

  def out(conv, x, kernel):
    return jnp.sin(conv(x, kernel, (1, 1), "SAME", **options))

  for conv in (grouped_conv, jax.lax.conv_general_dilated):
    y, pull = jax.vjp(functools.partial(out, conv), x, kernel)
    found = y, *pull(jnp.cos(y))
    if conv is grouped_conv:
      ours = found
  chex.assert_trees_all_close(ours, found, rtol=1e-5, atol=1e-5)


def test_decoder_ignores_padding():
  decoder = ConvDecoder(out=4, width=8, depth=1, groups=2)
  rng = np.random.default_rng(0)
  noise, x = rng.normal(size=(1, 9, 4)), rng.normal(size=(1, 3, 4))
  sets = [
    TokenSet(jnp.asarray([ids]), jnp.asarray([[True, True, valid]]))
    for ids, valid in (((4, 1, 0), False), ((4, 1, 7), False), ((4, 1, 7), True))
  ]
  params = decoder.init(jax.random.key(0), x, sets[0], noise, grid=(3, 3))
  a, b, c = (decoder.apply(params, x, s, noise, grid=(3, 3)) for s in sets)
  np.testing.assert_array_equal(a, b)
  assert not np.allclose(b, c)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(layers=4), r"method.layers=4 must lie in 1\.\.3"),
    (dict(momentum=(0.9, 0.5)), "first <= last"),
    (dict(momentum_share=0.0), r"momentum_share=0.0 in \(0, 1\]"),
    (dict(decoder=dict(width=8, depth=1, kernel=2)), "method.decoder: kernel must be odd"),
    (dict(decoder=dict(width=9, depth=1, groups=2)), "groups=2 must divide the decoder's width=9"),
    (dict(masks=dict(ratio=1.5)), "method.masks: ratio"),
    (dict(noise=-1.0), "method.noise=-1.0 must not be negative"),
  ],
)
def test_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    data2vec2.build(RUN, **{**SETTINGS, **changes})
