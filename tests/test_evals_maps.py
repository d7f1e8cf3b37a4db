"""Attention maps and the predictor's retrieval against slow forms."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jepax import losses
from jepax.evals.maps import attention_maps, rollout
from jepax.evals.predictor import retrieval
from jepax.models.vit import ViT, sincos2d
from jepax.pretrained import Encoder, Preprocess

MODULE = ViT(patch=4, width=16, depth=2, heads=2, mlp_width=24, class_token=True)


def encoder_of(module, params):
  preprocess = Preprocess(size=(8, 8), mean=(0.5,), std=(0.2,))
  return Encoder(module=module, params=params, preprocess=preprocess, name="x")


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(MODULE.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
  return jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.3).astype(np.float32), shapes)


def test_maps_are_the_softmax_of_the_blocks_own_queries_and_keys(params):
  """Written out for the first block; a scanned stack gives the same maps."""
  images = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 1), np.uint8)
  maps = attention_maps(encoder_of(MODULE, params), images)
  assert maps.shape == (2, 2, 2, 5, 5)
  np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)

  pixels = (images / 255 - 0.5) / 0.2
  patches = pixels.reshape(2, 2, 4, 2, 4).swapaxes(2, 3).reshape(2, 4, 16)
  x = patches @ params["embed"]["kernel"] + params["embed"]["bias"] + sincos2d((2, 2), 16)
  x = np.concatenate([np.broadcast_to(params["class_token"], (2, 1, 16)), x], 1)
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  block = params["transformer"]["block0"]
  qkv = x * block["norm1"]["scale"] + block["norm1"]["bias"]
  qkv = qkv @ block["qkv"]["kernel"] + block["qkv"]["bias"]
  q, k = (qkv[..., 16 * i : 16 * i + 16].reshape(2, 5, 2, 8) for i in range(2))
  logits = np.einsum("bnhe,bmhe->bhnm", q, k) / np.sqrt(8)
  wanted = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  np.testing.assert_allclose(maps[0], wanted, atol=1e-5)  # rounding, and epsilon of the norm

  blocks = [params["transformer"][f"block{i}"] for i in range(2)]
  stacked = {**params, "transformer": {"blocks": jax.tree.map(lambda *a: np.stack(a), *blocks)}}
  scanned = attention_maps(encoder_of(MODULE.clone(scan=True), stacked), images)
  np.testing.assert_allclose(scanned, maps, atol=1e-5)


def test_rollout_multiplies_the_layers_in_order():
  rng = np.random.default_rng(2)
  maps = rng.dirichlet(np.ones(4), size=(3, 1, 2, 4)).astype(np.float32)
  wanted = np.eye(4)
  for layer in maps.mean(2)[:, 0]:
    wanted = (0.25 * np.eye(4) + 0.75 * layer) @ wanted
  found = rollout(jnp.asarray(maps), residual=0.25)[0]
  np.testing.assert_allclose(found, wanted, atol=1e-6)
  np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
  np.testing.assert_array_equal(rollout(jnp.asarray(maps), residual=1.0)[0], np.eye(4))
  with pytest.raises(ValueError, match="residual must lie"):
    rollout(jnp.asarray(maps), residual=1.5)


@dataclasses.dataclass(frozen=True)
class Oracle:
  """A predictor that returns given tokens at the target positions."""

  tokens: str  # 'own', 'place' (the mean image at that place), 'shifted' (the next place's)

  def apply(self, variables, context, context_set, targets, *, grid):
    full = variables["params"]["full"]  # [b n d]
    n = full.shape[1]
    if self.tokens == "place":
      full = jnp.broadcast_to(full.mean(0), full.shape)
    index = (targets.index + (self.tokens == "shifted")) % n
    return jax.vmap(lambda x, i: x[i])(full, index)


@pytest.mark.parametrize("tokens", ["own", "shifted", "place"])
def test_retrieval(tokens):
  method = tiny.experiment("ijepa").method
  images = np.random.default_rng(3).integers(0, 256, (6, tiny.SIZE, tiny.SIZE, 1), np.uint8)
  params, carry = jax.jit(method.init)(jax.random.key(0), {"image": images})
  full = method.encoder.apply({"params": carry["target"]}, method.views.clean(images))
  full = (full - full.mean(-1, keepdims=True)) / full.std(-1, keepdims=True)
  method = dataclasses.replace(method, predictor=Oracle(tokens))
  params = {**params, "predictor": {"full": full}}
  found = retrieval(method, params, carry, images, jax.random.key(1))
  if tokens == "own":
    assert found["place"] == 1 and found["image"] == 1
  if tokens == "shifted":
    assert found["place"] == 0
  if tokens == "place":  # knows where, not what: the same guess for every image of the batch
    assert found["place"] > 0.9 and found["image"] < 0.6
  assert found["place_chance"] == 1 / full.shape[1] and found["image_chance"] == 1 / 6
  with pytest.raises(ValueError, match="at least 2"):
    retrieval(method, params, carry, images[:1], jax.random.key(1))


def test_retrieval_looks_for_what_the_predictor_was_trained_on(monkeypatch):
  monkeypatch.setitem(losses.TARGET_NORMS, "none", jnp.negative)
  method = dataclasses.replace(tiny.experiment("ijepa").method, target_norm="none")
  images = np.random.default_rng(3).integers(0, 256, (6, tiny.SIZE, tiny.SIZE, 1), np.uint8)
  params, carry = jax.jit(method.init)(jax.random.key(0), {"image": images})
  full = method.encoder.apply({"params": carry["target"]}, method.views.clean(images))
  method = dataclasses.replace(method, predictor=Oracle("own"))
  found = retrieval(
    method, {**params, "predictor": {"full": -full}}, carry, images, jax.random.key(1)
  )
  assert found["place"] == 1 and found["image"] == 1
