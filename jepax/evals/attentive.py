"""Attentive probe: a learned query reads frozen tokens, a linear head labels what it found.

Where mean pooling mixes all patches alike, the probe may look for those that tell. It is not
linear, so its numbers stand beside the linear ones, never among them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import linen as nn

from jepax.evals import checks
from jepax.models.activations import gelu
from jepax.models.attention import attention
from jepax.models.norms import LayerNorm
from jepax.optim import warmup_cosine

Array = jax.Array | np.ndarray


class Pooler(nn.Module, kw_only=True):
  """Tokens [b t d] -> logits [b c]: one cross-attention block, then a linear layer.

  Keys and values are of the normed tokens, the query is learned and not normed, and there is no
  projection after the attention. Weights start normal with std 0.02, fc2's divided by sqrt(2).

  num_classes: c. heads: attention heads, which divide d. mlp_ratio: hidden units of the MLP / d.

  Source: facebookresearch/vjepa2, src/models/attentive_pooler.py and its CrossAttentionBlock.
  """

  num_classes: int
  heads: int
  mlp_ratio: int = 4

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    b, _, d = tokens.shape
    init = nn.initializers.normal
    layer = functools.partial(nn.Dense, kernel_init=init(0.02))
    norm = functools.partial(LayerNorm, epsilon=1e-5)
    query = self.param("query", init(0.02), (1, 1, d))
    q = rearrange(layer(d, name="q")(query), "a n (h e) -> a n h e", h=self.heads)
    kv = layer(2 * d, name="kv")(norm(name="norm1")(tokens.astype(jnp.float32)))
    k, v = rearrange(kv, "b t (s h e) -> s b t h e", s=2, h=self.heads)
    found = attention(jnp.broadcast_to(q, (b, *q.shape[1:])), k, v)  # [b 1 h e]
    x = query + rearrange(found, "b n h e -> b n (h e)")
    y = gelu(layer(self.mlp_ratio * d, name="fc1")(norm(name="norm2")(x)))
    x = x + nn.Dense(d, kernel_init=init(0.02 / 2**0.5), name="fc2")(y)
    return layer(self.num_classes, name="head")(x[:, 0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attentive:
  """How probes are trained by AdamW with a cosine to 0, and with which rates and decays.

  learning_rates, weight_decays: every pair is a probe of its own; decay moves all parameters.
  epochs, batch_size: the last, incomplete batch of an epoch is left out.
  heads: attention heads, which divide the width of the tokens.
  warmup_epochs: the rate rises linearly from 0 over these.
  """

  learning_rates: tuple[float, ...]
  weight_decays: tuple[float, ...]
  epochs: int
  batch_size: int
  heads: int
  warmup_epochs: int = 0

  def __post_init__(self):
    if not self.learning_rates or min(self.learning_rates) <= 0:
      raise ValueError(f"learning_rates must be above 0, at least one; found {self.learning_rates}")
    if not self.weight_decays or min(self.weight_decays) < 0:
      raise ValueError(f"weight_decays must be 0 or more, at least one; found {self.weight_decays}")
    if min(self.epochs, self.batch_size, self.heads) < 1:
      raise ValueError(
        "epochs, batch_size and heads must be at least 1, found "
        f"{self.epochs}, {self.batch_size}, {self.heads}"
      )
    if not 0 <= self.warmup_epochs <= self.epochs:
      raise ValueError(f"warmup_epochs={self.warmup_epochs} must lie in 0..{self.epochs}, epochs")

  @property
  def members(self) -> tuple[tuple[float, float], ...]:
    """(learning rate, weight decay) of each probe."""
    return tuple(itertools.product(self.learning_rates, self.weight_decays))


def vjepa2(*, batch_size: int = 256, heads: int = 16) -> Attentive:
  """V-JEPA 2's 5 rates x 4 decays over 20 epochs, on a pooler of one block.

  V-JEPA 2 itself puts three self-attention blocks before the cross-attention, which its
  ablation credits with 1 to 2 points; V-JEPA has none, as here.

  Source: arXiv 2506.09985 and facebookresearch/vjepa2, configs/eval.
  """
  return Attentive(
    learning_rates=(5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
    weight_decays=(0.01, 0.1, 0.4, 0.8),
    epochs=20,
    batch_size=batch_size,
    heads=heads,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
  """The probe that labels the validation split best, and how the others did.

  pooler, params: the chosen probe. learning_rate, weight_decay: its settings.
  accuracies: f32[members], on the validation split, in the order of `Attentive.members`; 0
    where training diverged.
  """

  pooler: Pooler
  params: Any
  learning_rate: float
  weight_decay: float
  accuracies: np.ndarray


def fit(
  train_x: Array,
  train_y: Array,
  val_x: Array,
  val_y: Array,
  *,
  num_classes: int,
  protocol: Attentive,
  seed: int,
) -> Fit:
  """Trains every probe, one after the other, and keeps the best on validation, the first at a tie.

  Args:
    train_x: f[n t d], frozen tokens; a 16-bit dtype halves their memory, arithmetic is float32.
    train_y: i32[n] in 0..num_classes - 1.
    val_x: f[n_val t d], of images that are neither trained nor tested on, see `splits`.
    val_y: i32[n_val].
    num_classes: c.
    protocol: the probes and how they are trained.
    seed: of the initial weights and the order of the images.

  Returns:
    The Fit; score it with `accuracy(fit, test_x, test_y)`.

  Raises:
    ValueError: shapes that do not match, labels out of range, a batch larger than the data,
      heads that do not divide the width, or no probe that stayed finite.
  """
  train_x = _tokens(train_x, name="train_x")
  val_x = _tokens(val_x, name="val_x", width=train_x.shape[2])
  train_y = checks.labels(train_y, name="train_y", count=len(train_x), num_classes=num_classes)
  val_y = checks.labels(val_y, name="val_y", count=len(val_x), num_classes=num_classes)
  if protocol.batch_size > len(train_x):
    raise ValueError(f"batch_size={protocol.batch_size} is more than the {len(train_x)} images")
  if train_x.shape[2] % protocol.heads:
    raise ValueError(f"heads={protocol.heads} do not divide tokens of width {train_x.shape[2]}")
  pooler = Pooler(num_classes=num_classes, heads=protocol.heads)
  # Rates and decays are arguments of one compiled program.
  rest = dataclasses.replace(protocol, learning_rates=(1.0,), weight_decays=(0.0,))
  key = jax.random.key(seed)
  trained = []
  for rate, decay in protocol.members:
    params = _train(train_x, train_y, rate, decay, key, pooler=pooler, protocol=rest)
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    share = float((_predict(pooler, params, val_x) == val_y).mean()) if finite else 0.0
    trained.append((share, finite, params))
  best = max(range(len(trained)), key=lambda i: trained[i][0])
  if not any(finite for _, finite, _ in trained):
    raise ValueError(f"every probe diverged; lower learning_rates={protocol.learning_rates}")
  accuracies = np.array([share for share, _, _ in trained], np.float32)
  return Fit(pooler, trained[best][2], *protocol.members[best], accuracies)


def predict(fit: Fit, test_x: Array) -> jax.Array:
  """The most likely class of each image.

  Args:
    fit: from `fit`.
    test_x: f[n t d], tokens.

  Returns:
    i32[n].
  """
  test_x = _tokens(test_x, name="test_x", width=fit.params["query"].shape[-1])
  return _predict(fit.pooler, fit.params, test_x)


def accuracy(fit: Fit, test_x: Array, test_y: Array) -> float:
  """The share of images that the chosen probe labels right, 0 to 1; see `predict`."""
  classes = fit.pooler.num_classes
  wanted = checks.labels(test_y, name="test_y", count=len(test_x), num_classes=classes)
  return float((predict(fit, test_x) == wanted).mean())


def _tokens(x: Array, *, name: str, width: int | None = None) -> jax.Array:
  if x.ndim != 3 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{name} must be a non-empty float array [images, tokens, width], found "
      f"{x.dtype}{list(x.shape)}"
    )
  if width is not None and x.shape[2] != width:
    raise ValueError(f"{name} has tokens of width {x.shape[2]}, the probe is of width {width}")
  return jnp.asarray(x)


@functools.partial(jax.jit, static_argnums=0)
def _predict(pooler, params, x):
  def one(tokens):
    return pooler.apply({"params": params}, tokens[None])[0].argmax().astype(jnp.int32)

  return jax.lax.map(one, x, batch_size=256)


@functools.partial(jax.jit, static_argnames=("pooler", "protocol"))
def _train(x, y, learning_rate, weight_decay, key, *, pooler, protocol):
  """The parameters of one probe; epochs and steps are scans, so one program is the whole fit."""
  count, batch = x.shape[0], protocol.batch_size
  per_epoch = count // batch
  steps, warmup = protocol.epochs * per_epoch, protocol.warmup_epochs * per_epoch
  schedule = warmup_cosine(0, learning_rate, 0, warmup=warmup, steps=steps)
  tx = optax.adamw(schedule, weight_decay=weight_decay)
  init_key, order_key = jax.random.split(key)

  def loss(params, tokens, labels):
    logits = pooler.apply({"params": params}, tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  def step(carry, rows):
    params, opt_state = carry
    grads = jax.grad(loss)(params, x[rows], y[rows])
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), None

  def epoch(carry, index):
    order = jax.random.permutation(jax.random.fold_in(order_key, index), count)
    rows = order[: per_epoch * batch].reshape(per_epoch, batch)
    return jax.lax.scan(step, carry, rows)[0], None

  params = pooler.init(init_key, x[:1])["params"]
  (params, _), _ = jax.lax.scan(epoch, (params, tx.init(params)), jnp.arange(protocol.epochs))
  return params
