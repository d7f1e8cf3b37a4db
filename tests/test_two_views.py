"""The losses of BYOL, SimSiam and MoCo v3 as wired, and their targets, without a network."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from jepax.experiment import prepare
from jepax.methods.byol import BYOL
from jepax.methods.moco_v3 import MoCoV3
from jepax.methods.simsiam import SimSiam
from jepax.methods.two_views import spread
from jepax.sharding import make_mesh


class Linear(nn.Module):
  """A matrix, as encoder (one token an image) and as head."""

  tokens: bool = False
  class_token: bool = False

  @nn.compact
  def __call__(self, x):
    out = x.reshape(x.shape[0], -1) @ self.param("w", nn.initializers.normal(1.0), (4, 4))
    return out[:, None] if self.tokens else out


class Given:
  """Two views that are there already: image f32[b 2 4]."""

  crops = (None, None)

  def __call__(self, keys, images):
    return images[:, 0], images[:, 1]


def normal(*shape: int, seed: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def momentum(step):
  return 0.5 + 0.1 * step


def unit(z):
  return z / np.linalg.norm(z, axis=-1, keepdims=True)


W = {name: normal(4, 4, seed=i) for i, name in enumerate(["encoder", "projector", "predictor"])}
T = {"encoder": normal(4, 4, seed=7), "projector": normal(4, 4, seed=8)}
PARAMS = {name: {"w": jnp.asarray(w)} for name, w in W.items()}
CARRY = {"target": {name: {"w": jnp.asarray(w)} for name, w in T.items()}}
VIEWS = normal(5, 2, 4, seed=9)
MODULES = dict(encoder=Linear(tokens=True), projector=Linear(), predictor=Linear(), views=Given())

X, Y = (VIEWS[:, v] @ W["encoder"] @ W["projector"] for v in (0, 1))
PX, PY = X @ W["predictor"], Y @ W["predictor"]
TX, TY = (VIEWS[:, v] @ T["encoder"] @ T["projector"] for v in (0, 1))


def cosine(x, y) -> float:
  return float(np.mean(np.sum(unit(x) * unit(y), -1)))


def value(method, params=PARAMS):
  return method.loss(params, CARRY, {"image": jnp.asarray(VIEWS)}, jax.random.key(0), 0)[0]


def ctr(q, k, tau):
  logits = unit(q) @ unit(k).T / tau
  return 2 * tau * np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(logits)])


def test_byol():
  expected = np.mean(((unit(PX) - unit(TY)) ** 2).sum(-1) + ((unit(PY) - unit(TX)) ** 2).sum(-1))
  np.testing.assert_allclose(value(BYOL(**MODULES, momentum=momentum)), expected, rtol=1e-5)


def test_simsiam_and_where_its_gradient_stops():
  method = SimSiam(**MODULES)
  found = value(method)
  np.testing.assert_allclose(found, -(cosine(PX, Y) + cosine(PY, X)) / 2, rtol=1e-5, atol=1e-6)

  def with_constant_targets(params):
    (x, y), _ = method.project(params, {}, [VIEWS[:, v] for v in (0, 1)])
    loss = 0.0
    for z, target in ((x, Y), (y, X)):
      p = method.predict(params, z)
      p = p / jnp.linalg.norm(p, axis=-1, keepdims=True)
      loss -= jnp.mean(jnp.sum(p * unit(target), -1)) / 2
    return loss

  grads = jax.grad(lambda p: value(method, p))(PARAMS)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    grads,
    jax.grad(with_constant_targets)(PARAMS),
  )


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_moco_v3(tau):
  method = MoCoV3(**MODULES, momentum=momentum, temperature=tau, frozen_patches=False)
  expected = ctr(PX, TY, tau) + ctr(PY, TX, tau)
  np.testing.assert_allclose(value(method), expected, rtol=1e-5)


def test_a_target_follows_the_parameters():
  """Three steps by hand; MoCo v3's momentum is that of the step whose keys the target makes."""
  for method, shift in (
    (BYOL(**MODULES, momentum=momentum), 0),
    (MoCoV3(**MODULES, momentum=momentum, frozen_patches=False), 1),
  ):
    carry, expected = CARRY, dict(T)
    for step in range(3):
      params = {name: {"w": (step + 1.0) * leaf["w"]} for name, leaf in PARAMS.items()}
      carry = method.update(params, carry, step)
      m = momentum(step + shift)
      expected = {n: m * expected[n] + (1 - m) * (step + 1) * W[n] for n in expected}
    for name, leaf in carry["target"].items():
      np.testing.assert_allclose(leaf["w"], expected[name], rtol=1e-5)
    assert "predictor" not in carry["target"]


def test_spread():
  assert spread(jnp.ones((8, 4))) == 0
  many = jnp.asarray(normal(4000, 64, seed=3))
  assert float(spread(7 * many)) == pytest.approx(1.0, abs=0.02)  # a standard error of .0014


def test_frozen_patches_lie_where_no_optimizer_reaches_them():
  class Named(Linear):
    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4, name="embed")(x.reshape(x.shape[0], -1))
      return super().__call__(x)

  class Clean(Given):
    def clean(self, images):
      return images[:, 0]

  modules = {**MODULES, "encoder": Named(tokens=True), "views": Clean()}
  method = MoCoV3(**modules, momentum=momentum)
  batch = {"image": jnp.asarray(VIEWS)}
  params, carry = method.init(jax.random.key(0), batch)
  assert set(params["encoder"]) == set(carry["target"]["encoder"]) == {"w"}
  for branch in method.branches:
    assert set(method.weights(params, carry, branch=branch)) == {"w", "embed"}
  loss = lambda carry: method.loss(params, carry, batch, jax.random.key(0), 0)[0]  # noqa: E731
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.grad(loss)(carry)))
  moved = {**carry, "embed": jax.tree.map(lambda x: x + 1, carry["embed"])}
  assert loss(moved) != loss(carry)  # it is used


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    (
      "simsiam",
      dict(projector=()),
      r"method.projector=\(\) must be hidden widths and the output's",
    ),
    ("byol", dict(second=3), r"method.second: found 3, expected a section \| None"),
    ("simclr", dict(second=[]), r"method.second: found \[\], expected a section"),
    ("vicreg", dict(variance=-1.0), "method.variance=-1.0 must not be negative"),
    ("barlow_twins", dict(off_diagonal=-1.0), "method.off_diagonal=-1.0 must not be negative"),
    ("lejepa", dict(local_views=-1), "method.local_views=-1 must not be negative"),
    ("lejepa", dict(weight=2.0), r"method.weight=2.0 must lie in \[0, 1\]: 'paper' weighs"),
    (
      "simclr",
      dict(encoder=dict(variant="tiny", stem="cifar")),
      r"\['stem'\], which variant='tiny'",
    ),
  ],
)
def test_wrong_settings(name, changes, message):
  with pytest.raises(ValueError, match=message):
    prepare(tiny.config(name, **{f"method__{key}": value for key, value in changes.items()}))


def test_heads_refuse_a_batch_of_one():
  mesh = make_mesh(devices=jax.devices()[:1])
  with pytest.raises(ValueError, match="BatchNorm of a head can't train on one sample"):
    prepare(tiny.config("simclr", batch_size=1), data=tiny.data(), mesh=mesh)
