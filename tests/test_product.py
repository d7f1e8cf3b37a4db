"""The matrix product of linear layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jepax.models.product import product
from jepax.sharding import make_mesh

X, KERNEL = (8, 64, 6), (6, 5)


def loss(x, kernel, multiply):
  return jnp.sum(jnp.sin(multiply(x, kernel, (((2,), (0,)), ((), ())))))


def test_product_and_its_gradients_are_dot_generals():
  x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate((X, KERNEL)))
  gradient = jax.value_and_grad(loss, argnums=(0, 1))
  ours, theirs = (gradient(x, kernel, f) for f in (product, jax.lax.dot_general))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), ours, theirs)


def test_the_kernels_gradient_is_not_turned_after_it_was_summed_over_devices():
  mesh = make_mesh(devices=jax.devices()[:2])
  x = jax.ShapeDtypeStruct(X, np.float32, sharding=jax.NamedSharding(mesh, P("data")))
  kernel = jax.ShapeDtypeStruct(KERNEL, np.float32, sharding=jax.NamedSharding(mesh, P()))

  def turned(multiply):
    gradient = jax.jit(jax.grad(functools.partial(loss, multiply=multiply), argnums=1))
    text = gradient.lower(x, kernel).compile().as_text()
    assert "all-reduce(" in text
    return "f32[5,6]" in text

  assert turned(jax.lax.dot_general)  # the day this fails, `product` is no longer needed
  assert not turned(product)
