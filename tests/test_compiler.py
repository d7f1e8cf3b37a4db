"""XLA's options: taken by the XLA that is installed, and left out where they mean nothing."""

import platform
from types import MappingProxyType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jepax import compiler
from jepax.sharding import make_mesh


def test_products_on_a_cpu_are_onednns(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS")
  a, b = np.random.default_rng(0).normal(size=(2, 4, 96, 96)).astype(np.float32)
  product = jax.jit(jnp.matmul, compiler_options=compiler.options(make_mesh()))
  np.testing.assert_allclose(product(a, b), np.float64(a) @ np.float64(b), rtol=1e-5, atol=1e-5)
  text = product.lower(a, b).compile().as_text()
  assert "__ynn_fusion" not in text
  if platform.machine() in ("x86_64", "AMD64"):
    assert "__onednn_fusion" in text


def test_an_option_an_xla_does_not_know_is_left_out(monkeypatch):
  known = {"xla_cpu_use_onednn": True}
  unknown = {"xla_cpu_no_such_option": "1", "xla_cpu_use_onednn_too": True}
  monkeypatch.setattr(compiler, "_CPU", MappingProxyType({**unknown, **known}))
  assert compiler.options(make_mesh()) == known


def test_what_xla_flags_say_stands(monkeypatch):
  monkeypatch.setattr(compiler, "_CPU", MappingProxyType({"xla_cpu_use_onednn": True}))
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_onednn_fast=1")
  assert compiler.options(make_mesh()) == {"xla_cpu_use_onednn": True}
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_cpu_use_onednn=0")
  assert compiler.options(make_mesh()) == {}


def test_other_platforms_get_none():
  mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
  assert compiler.options(mesh) == {}
