"""Attentive probe: against a slow form, on labels that pooling hides, and its choice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from jepax.evals import attentive
from jepax.evals.attentive import Attentive, Pooler

SMALL = Attentive(learning_rates=(1e-2,), weight_decays=(0.01,), epochs=12, batch_size=32, heads=2)


def needles(count, *, seed):
  """Tokens f32[n 9 8] of noise, one of them marked by its first entry: its second is the class."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(count, 9, 8)).astype(np.float32)
  y = rng.integers(0, 2, size=count)
  x[:, :, 0] = 0
  place = rng.integers(0, 9, size=count)
  x[np.arange(count), place, 0] = 4
  x[np.arange(count), place, 1] = 2.0 * y - 1
  return x, y


def slow_pooler(p, x, heads):
  """One image, tokens f64[t d] -> logits [c]."""

  def layer(name, z):
    return z @ p[name]["kernel"] + p[name]["bias"]

  def norm(name, z):
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    return z * p[name]["scale"] + p[name]["bias"]

  d = x.shape[1]
  query = p["query"][0, 0]
  q, kv = layer("q", query), layer("kv", norm("norm1", x))
  found = []
  for h in range(heads):
    cut = slice(h * d // heads, (h + 1) * d // heads)
    logits = kv[:, :d][:, cut] @ q[cut] / np.sqrt(d // heads)
    weights = np.exp(logits) / np.exp(logits).sum()
    found.append(weights @ kv[:, d:][:, cut])
  z = query + np.concatenate(found)
  hidden = layer("fc1", norm("norm2", z))
  z = z + layer("fc2", hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))))
  return layer("head", z)


def test_the_pooler_equals_the_slow_form():
  pooler = Pooler(num_classes=3, heads=2)
  x = np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32)
  params = jax.jit(pooler.init)(jax.random.key(0), x)["params"]
  assert np.std(params["fc2"]["kernel"]) == pytest.approx(0.02 / 2**0.5, rel=0.2)
  rng = np.random.default_rng(1)  # weights of order 1, so that every term counts
  params = jax.tree.map(lambda p: 0.5 * rng.normal(size=p.shape).astype(np.float32), params)
  apply = jax.jit(pooler.apply)
  found = apply({"params": params}, x)
  exact = jax.tree.map(lambda v: np.asarray(v, np.float64), params)
  want = np.stack([slow_pooler(exact, image, 2) for image in x])
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)  # float32 against float64
  half = jnp.asarray(x, jnp.bfloat16)  # stored so, but computed on in float32
  found, want = (apply({"params": params}, t) for t in (half, half.astype(jnp.float32)))
  np.testing.assert_array_equal(found, want)


def test_it_finds_the_token_that_tells_and_the_best_member_on_validation():
  two = dataclasses.replace(SMALL, learning_rates=(1e-6, 1e-2))
  x, y = needles(400, seed=0)
  fit = attentive.fit(x[:320], y[:320], x[320:], y[320:], num_classes=2, protocol=two, seed=0)
  assert fit.learning_rate == 1e-2 and fit.accuracies.argmax() == 1
  assert attentive.accuracy(fit, *needles(200, seed=1)) > 0.95
  found = attentive.predict(fit, x[320:])
  assert (np.asarray(found) == y[320:]).mean() == pytest.approx(fit.accuracies[1])
  wild = dataclasses.replace(SMALL, learning_rates=(1e38,))
  with pytest.raises(ValueError, match="every probe diverged"):
    attentive.fit(x[:320], y[:320], x[320:], y[320:], num_classes=2, protocol=wild, seed=0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"learning_rates": (0.0,)}, "learning_rates must be above 0"),
    ({"epochs": 0}, "epochs, batch_size and heads must be at least 1, found 0"),
    ({"warmup_epochs": 13}, r"warmup_epochs=13 must lie in 0\.\.12"),
    ({"batch_size": 65}, "batch_size=65 is more than the 64 images"),
    ({"heads": 3}, "heads=3 do not divide tokens of width 8"),
  ],
)
def test_impossible_settings_say_what_is_wrong(change, message):
  x, y = needles(64, seed=0)
  with pytest.raises(ValueError, match=message):
    protocol = dataclasses.replace(SMALL, **change)
    attentive.fit(x, y, x, y, num_classes=2, protocol=protocol, seed=0)


def test_impossible_tokens_say_what_is_wrong():
  x, y = needles(64, seed=0)
  with pytest.raises(ValueError, match=r"\[images, tokens, width\], found float32\[64, 8\]"):
    attentive.fit(x[:, 0], y, x, y, num_classes=2, protocol=SMALL, seed=0)
  with pytest.raises(ValueError, match="val_x has tokens of width 4, the probe is of width 8"):
    attentive.fit(x, y, x[..., :4], y, num_classes=2, protocol=SMALL, seed=0)
