"""Remedies against collapse: on a toy that collapses without one, and as a part of I-JEPA."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jepax import config as config_lib
from jepax import losses, regularisers, sharding
from jepax.core import make_train_step
from jepax.evals import collapse
from jepax.experiment import prepare
from jepax.masks.tokens import Masks
from jepax.methods.barlow_twins import redundancy
from jepax.models.heads import BatchNorm

# --- the toy --------------------------------------------------------------------------------


def regularised(**section):
  penalty = regularisers.build(section, where="remedy")

  def remedy(key, x, prediction, target):
    tokens = x[:, None]
    loss, _ = penalty(tokens, jnp.ones(tokens.shape[:2], bool), key)
    return jnp.square(prediction - target).mean() + loss

  return remedy


def barlow(key, x, prediction, target):
  normed = (BatchNorm(affine=False).apply({}, z) for z in (prediction, target))
  on, off = redundancy(*normed)
  return 0.05 * (on + 5e-3 * off)


# How a prediction and its target are compared, with x the online encoder's output.
REMEDIES = {
  "none": lambda key, x, prediction, target: jnp.square(prediction - target).mean(),
  "stopped gradient": lambda key, x, prediction, target: jnp.square(
    prediction - jax.lax.stop_gradient(target)
  ).mean(),
  "contrast": lambda key, x, prediction, target: losses.info_nce(
    prediction, target, temperature=0.1
  ),
  "redundancy": barlow,
  "vicreg": regularised(name="vicreg", weight=0.1),
  "sigreg": regularised(name="sigreg", weight=0.05, slices=32),
}


def toy(remedy) -> dict[str, float]:
  """y = .8 x + .6 noise, one encoder for both, its output predicted; collapse numbers after.

  The same encoder, predictor, data and steps for every remedy.
  """
  sizes = {"encoder": (32, 64, 32), "predictor": (32, 32, 32)}
  init = jax.nn.initializers.lecun_normal()
  keys = iter(jax.random.split(jax.random.key(0), 4))
  params = {
    name: [{"w": init(next(keys), io), "b": jnp.zeros(io[1])} for io in itertools.pairwise(size)]
    for name, size in sizes.items()
  }
  tx = optax.adamw(3e-3)

  def mlp(layers, x):
    x = jax.nn.relu(x @ layers[0]["w"] + layers[0]["b"])
    return x @ layers[1]["w"] + layers[1]["b"]

  def loss(params, key):
    x, noise = jax.random.normal(key, (2, 64, 32))
    target = mlp(params["encoder"], 0.8 * x + 0.6 * noise)
    online = mlp(params["encoder"], x)
    return remedy(jax.random.fold_in(key, 1), online, mlp(params["predictor"], online), target)

  def step(state, key):
    params, opt_state = state
    updates, opt_state = tx.update(jax.grad(loss)(params, key), opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  keys = jax.random.split(jax.random.key(1), 2000)
  (params, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, keys))((params, tx.init(params)))
  return collapse.numbers(mlp(params["encoder"], jax.random.normal(jax.random.key(2), (512, 32))))


@pytest.mark.parametrize("name", sorted(REMEDIES))
def test_the_toy_collapses_without_a_remedy_and_with_none_of_them(name):
  numbers = toy(REMEDIES[name])
  message = collapse.alarm("online", numbers, dim=32)
  if name == "none":
    assert message.startswith("online encoder: complete collapse")
    assert numbers["feature_std"] < 0.01
  else:
    assert message is None
    assert numbers["feature_std"] > 0.1


# --- as a part of I-JEPA --------------------------------------------------------------------

RUN = config_lib.Run(size=tiny.SIZE, channels=1, mean=(0.3,), std=(0.3,), steps=10)
SECTIONS = [
  dict(name="vicreg", weight=0.1),
  dict(name="vicreg", weight=0.1, on="tokens"),
  dict(name="sigreg", weight=0.1, slices=8),
  dict(name="sigreg", weight=0.1, slices=8, on="tokens"),
]


def ijepa(section=None):
  arguments = dict(name="ijepa", **tiny.METHODS["ijepa"])
  return config_lib.build_method({**arguments, "regulariser": section}, RUN)


@pytest.fixture(scope="module")
def start():
  """(params, carry, batch, loss without a regulariser)."""
  method, batch = ijepa(), {"image": tiny.images(8)}
  params, carry = jax.jit(method.init)(jax.random.key(0), batch)
  loss, out = jax.jit(method.loss)(params, carry, batch, jax.random.key(1), 0)
  assert not method.couples_batch and "loss/prediction" not in out.metrics
  return params, carry, batch, loss


def padded(sampler, *, targets=0):
  """The same context in three more slots that are not valid, and targets in so many more."""

  def widen(tokens, by):
    pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, by)])  # noqa: E731
    return jax.tree.map(pad, tokens)

  def draw(keys, step_key) -> Masks:
    masks = sampler(keys, step_key)
    return masks.replace(context=widen(masks.context, 3), targets=widen(masks.targets, targets))

  return draw


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: f"{s['name']} {s.get('on', 'pooled')}")
def test_a_regulariser_adds_its_penalty_and_leaves_the_prediction(start, section):
  params, carry, batch, plain = start
  method = ijepa(section)
  call = lambda m: m.loss(params, carry, batch, jax.random.key(1), 0)  # noqa: E731
  wider = dataclasses.replace(method, masks=padded(method.masks))
  (loss, out), (same, _) = jax.jit(lambda: (call(method), call(wider)))()
  np.testing.assert_allclose(out.metrics["loss/prediction"], plain, rtol=1e-6)
  parts = out.metrics
  penalty = (
    25 * parts["loss/variance"] + parts["loss/covariance"]
    if section["name"] == "vicreg"
    else parts["loss/sigreg"]
  )
  np.testing.assert_allclose(loss, plain + 0.1 * penalty, rtol=1e-5)
  assert penalty > 0
  np.testing.assert_allclose(same, loss, rtol=1e-5)  # padding never counts


def test_a_regulariser_couples_the_batch():
  method = ijepa(SECTIONS[0])
  assert method.couples_batch
  with pytest.raises(ValueError, match="accumulate=1"):
    make_train_step(method, optax.sgd(0.1), accumulate=2)


@pytest.mark.parametrize(
  "section, message",
  [
    (dict(name="vicregs", weight=1.0), "method.regulariser.name='vicregs' is unknown; did you"),
    (dict(name="vicreg", weight=0.0), "weight must be above 0, found 0.0"),
    (dict(name="sigreg", weight=0.1, on="token"), "on='token' is unknown; did you mean 'tokens'"),
    (dict(name="sigreg"), r"lacks \['weight'\]"),
    (dict(name="sigreg", weight=1.0, slices=0), "slices must be at least 1, found 0"),
    (dict(name="vicreg", weight=1.0, covariance=-1.0), "covariance=-1.0 must not be negative"),
    ("vicreg", r"method.regulariser: found 'vicreg', expected a section \| None"),
    (dict(name="sigreg", weight=0.1, slice=8), "slice is unknown; did you mean 'slices'"),
  ],
)
def test_wrong_sections(section, message):
  with pytest.raises(ValueError, match=message):
    ijepa(section)


# --- contrast -------------------------------------------------------------------------------


def slow_info_nce(prediction, target, valid, temperature) -> float:
  """Sample by sample in float64: how well each finds its own target among all."""

  def pooled(x):
    means = [x[i][valid[i]].mean(0) for i in range(len(x))]
    return [mean / np.linalg.norm(mean) for mean in means]

  found, own = [], pooled(np.float64(target))
  for i, x in enumerate(pooled(np.float64(prediction))):
    scores = [np.exp(x @ y / temperature) for y in own]
    found.append(-np.log(scores[i] / sum(scores)))
  return float(np.mean(found))


def tokens(seed=0, *, b=6):
  """Predictions and targets [b m t d] that have something in common, and which tokens count."""
  rng = np.random.default_rng(seed)
  target = rng.normal(size=(b, 2, 5, 8)).astype(np.float32) + rng.normal(size=(b, 1, 1, 8))
  prediction = target + 2.5 * rng.normal(size=target.shape)
  valid = np.arange(5) < rng.integers(1, 6, (b, 2, 1))
  return np.float32(prediction), np.float32(target), valid


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrast_equals_a_slow_form(temperature):
  prediction, target, valid = tokens()
  contrast = regularisers.Contrast(weight=0.5, temperature=temperature)
  loss, metrics = jax.jit(contrast)(prediction, target, valid)
  expected = slow_info_nce(prediction, target, valid, temperature)
  np.testing.assert_allclose(metrics["loss/contrast"], expected, rtol=1e-5)
  np.testing.assert_allclose(loss, 0.5 * expected, rtol=1e-5)
  assert 0.1 < expected < np.log(len(valid))  # targets are found, but not surely


def test_contrast_does_not_see_what_is_not_valid():
  prediction, target, valid = tokens()
  contrast = jax.jit(regularisers.Contrast(weight=1.0))
  before, _ = contrast(prediction, target, valid)
  prediction[~valid], target[~valid] = 1e6, -1e6
  after, _ = contrast(prediction, target, valid)
  assert after == before


CONTRAST = dict(weight=0.3, temperature=0.2)


def contrasted(section=CONTRAST):
  return config_lib.build_method(dict(name="ijepa", **tiny.METHODS["ijepa"], contrast=section), RUN)


def test_contrast_in_ijepa(start):
  """Its value, its padding, and where its gradient goes, apart from the elementwise loss."""
  params, carry, batch, plain = start
  method, key = contrasted(), jax.random.key(1)
  wider = dataclasses.replace(method, masks=padded(method.masks, targets=5))

  def term(params, carry):
    loss, out = method.loss(params, carry, batch, key, 0)
    return out.metrics["loss/contrast"], (loss, out.metrics)

  def call():
    found = jax.value_and_grad(term, argnums=(0, 1), has_aux=True)(params, carry)
    return found, wider.loss(params, carry, batch, key, 0)[0]

  (((contrast, (loss, metrics)), (moving, still)), same) = jax.jit(call)()
  np.testing.assert_allclose(metrics["loss/prediction"], plain, rtol=1e-6)
  np.testing.assert_allclose(loss, plain + 0.3 * contrast, rtol=1e-6)
  np.testing.assert_allclose(same, loss, rtol=1e-5)
  for part in ("predictor", "encoder"):
    assert all(np.any(leaf) for leaf in jax.tree.leaves(moving[part]["transformer"]))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(still))


def test_contrast_on_four_devices_equals_one():
  """The negatives are those of the global batch, whichever device holds them."""
  found = {}
  for devices in (1, 4):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    config = tiny.config("ijepa", method__contrast=CONTRAST)
    run = prepare(config, data=tiny.data(), mesh=mesh)
    batch = sharding.global_batch(tiny.batches(1)[0], run.batch_sharding)
    _, metrics = run.train_step(run.initial_state(), batch)
    found[devices] = jax.device_get(metrics)
  for name in ("loss/contrast", "train/loss", "predictor/grad_norm", "encoder/grad_norm"):
    np.testing.assert_allclose(found[4][name], found[1][name], rtol=1e-5)
  assert found[1]["loss/contrast"] > 0


def test_contrast_couples_the_batch():
  method = contrasted()
  assert method.couples_batch == "negatives" and ijepa(SECTIONS[0]).couples_batch == "statistics"
  with pytest.raises(ValueError, match="accumulate=1"):
    make_train_step(method, optax.sgd(0.1), accumulate=2)
  with pytest.raises(ValueError, match="batch_size must be 2 or more"):
    regularisers.Contrast(weight=1.0)(*tokens(b=1))


@pytest.mark.parametrize(
  "section, message",
  [
    (dict(weight=0.0), "^method.contrast: weight must be above 0, found 0.0"),
    (dict(weight=1.0, temperature=0.0), "^method.contrast: temperature must be above 0"),
    (dict(temperature=0.1), r"^method.contrast lacks \['weight'\]"),
    (dict(weight=1.0, temprature=0.1), "temprature is unknown; did you mean 'temperature'"),
    (0.1, r"method.contrast: found 0.1, expected a section \| None"),
  ],
)
def test_wrong_contrast(section, message):
  with pytest.raises(ValueError, match=message):
    contrasted(section)
