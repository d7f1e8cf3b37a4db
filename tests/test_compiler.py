"""XLA's options: taken by the XLA that is installed, and left out where they mean nothing."""

from types import MappingProxyType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax import compiler
from jepax.sharding import make_mesh


@pytest.fixture
def unsure():
  compiler._known.cache_clear()
  yield
  compiler._known.cache_clear()


def test_products_on_a_cpu_are_not_ynnpacks():
  x = jnp.ones((256, 256))
  product = jax.jit(jnp.matmul, compiler_options=compiler.options(make_mesh()))
  assert "__ynn_fusion" not in product.lower(x, x).compile().as_text()
  np.testing.assert_array_equal(product(x, x), np.full((256, 256), 256.0))


def test_options_an_xla_does_not_know_are_left_out(unsure, monkeypatch):
  monkeypatch.setattr(compiler, "_CPU", MappingProxyType({"xla_cpu_no_such_option": "1"}))
  assert compiler.options(make_mesh()) == {}


def test_other_platforms_get_none():
  mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
  assert compiler.options(mesh) == {}
