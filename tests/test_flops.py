"""FLOPs counted in traced programs: against hand counts, a method's parts and XLA's own count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jepax import config as config_lib
from jepax import flops, sharding


def count(function, *arguments) -> int:
  return flops.count(jax.make_jaxpr(function)(*arguments))


def shaped(*shape: int, dtype=np.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def chain(x, w, *, times: int = 6):
  """`times` products with w, in a scan."""
  return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=times)[0]


X, W = shaped(8, 16), shaped(16, 16)
ONE = 2 * 8 * 16 * 16


@pytest.mark.parametrize(
  ("function", "arguments", "expected"),
  [
    (lambda x, w: x @ w, (X, W), ONE),
    (jax.jit(lambda x, w: jax.jit(jnp.matmul)(x, w) + 1), (X, W), ONE),
    (lambda a, b: jnp.einsum("bhnd,bhmd->bhnm", a, b), (shaped(2, 3, 5, 7), shaped(2, 3, 4, 7)),
     2 * 2 * 3 * 5 * 4 * 7),
    (jax.vmap(lambda x, w: x @ w), (shaped(4, 8, 16), shaped(4, 16, 16)), 4 * ONE),
    (chain, (X, W), 6 * ONE),
    (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), (X, W), ONE),
    (lambda a, b: a @ b, (shaped(8, 16, dtype=np.int32), shaped(16, 16, dtype=np.int32)), 0),
    (lambda x, k: jax.lax.conv(x, k, (2, 2), "VALID"), (shaped(2, 3, 8, 8), shaped(5, 3, 2, 2)),
     2 * (2 * 5 * 4 * 4) * (3 * 2 * 2)),
    (lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x), (X,), 0),
  ],
)  # fmt: skip
def test_by_hand(function, arguments, expected):
  assert count(function, *arguments) == expected


def test_backward_costs_twice_the_forward():
  """Of the gradient for x and w; for w alone the first product's gradient for x is spared."""
  loss = lambda x, w: chain(x, w).sum()  # noqa: E731
  assert count(jax.grad(loss, (0, 1)), X, W) == 3 * 6 * ONE
  first = lambda w, x: (x @ w).sum()  # noqa: E731
  assert count(jax.grad(first), W, X) == 2 * ONE
  frozen = lambda w, x: (x @ w + x @ jax.lax.stop_gradient(w)).sum()  # noqa: E731
  assert count(jax.grad(frozen), W, X) == 3 * ONE


def test_rematerialisation_is_counted_where_it_is_traced():
  f = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w) @ w).sum())
  assert count(jax.grad(f, (0, 1)), X, W) == (2 * 3 + 2) * ONE  # both products are made again


def test_a_device_program_counts_once_a_device():
  mesh = sharding.make_mesh(data=8)
  rows = jax.sharding.PartitionSpec("data")
  f = jax.shard_map(
    jnp.matmul, mesh=mesh, in_specs=(rows, jax.sharding.PartitionSpec()), out_specs=rows
  )
  assert count(f, X, W) == ONE


def test_a_loop_of_unknown_length_is_refused():
  def loop(x, w):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w, x)

  with pytest.raises(ValueError, match="while loop"):
    count(loop, X, W)


def tiny_gradient(method: str, *, width: int) -> tuple:
  """The traced gradient of a method's loss, and the method with what it was traced for."""
  section = config_lib.ConfigDict(dict(name=method, **tiny.METHODS[method]))
  section.encoder.update(width=width, heads=2, depth=2, mlp_width=4 * width)
  run = config_lib.Run(size=tiny.SIZE, channels=1, mean=(0.5,), std=(0.25,), steps=10)
  found = config_lib.build_method(section, run)
  key, batch = jax.random.key(0), {"image": tiny.images(tiny.BATCH)}
  params, carry = jax.eval_shape(found.init, key, batch)
  gradient = jax.jit(jax.grad(found.loss, has_aux=True))
  return gradient.trace(params, carry, batch, key, 0), found, params


def test_ijepa_is_the_sum_of_its_parts():
  """The target once, the trained parts thrice, but for the gradient of the pixels."""
  gradient, method, params = tiny_gradient("ijepa", width=32)
  images = shaped(tiny.BATCH, tiny.SIZE, tiny.SIZE, 1)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), tiny.BATCH))
  masks = jax.eval_shape(method.masks, keys, jax.eval_shape(jax.random.key, 0))
  weights = {"params": params["encoder"]}
  target = count(method.encoder.apply, weights, images)
  context = count(method.encoder.apply, weights, images, masks.context)
  embed = 2 * masks.context.index.size * method.encoder.patch**2 * method.encoder.width
  tokens = shaped(*masks.context.index.shape, method.encoder.width)
  predictor = count(
    lambda p, *inputs: method.predictor.apply({"params": p}, *inputs, grid=method.grid),
    *(params["predictor"], tokens, masks.context, masks.targets),
  )
  assert flops.count(gradient.jaxpr) == target + 3 * context - embed + 3 * predictor


@pytest.mark.parametrize("method", sorted(tiny.METHODS))
def test_against_xla(method):
  """XLA's own count of an unrolled gradient, before it optimises.

  XLA also counts elementwise operations, one each; at this width they are 2 to 4 % of the whole.
  """
  gradient, _, _ = tiny_gradient(method, width=256)
  xla = gradient.lower().cost_analysis()["flops"]
  assert 1.0 < xla / flops.count(gradient.jaxpr) < 1.05
