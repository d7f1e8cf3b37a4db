"""XLA's options: taken by the XLA that is installed, and left out where they mean nothing."""

import platform
from types import MappingProxyType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jepax import compiler
from jepax.experiment import prepare
from jepax.sharding import make_mesh

ON_X86 = platform.machine() in ("x86_64", "AMD64")  # jaxlib has oneDNN there


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def test_products_on_a_cpu_are_onednns(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS")
  a, b = np.random.default_rng(0).normal(size=(2, 4, 96, 96)).astype(np.float32)
  product = jax.jit(jnp.matmul, compiler_options=compiler.options(make_mesh()))
  np.testing.assert_allclose(product(a, b), np.float64(a) @ np.float64(b), rtol=1e-5, atol=1e-5)
  text = product.lower(a, b).compile().as_text()
  assert "__ynn_fusion" not in text
  assert ("__onednn_fusion" in text) == ON_X86


def test_a_step_is_the_same_by_onednn_and_by_eigen(monkeypatch):
  def run() -> tuple[str, list[list[float]]]:
    experiment = prepare(tiny.config("ijepa"), data=tiny.data(), mesh=one_device())
    state, seen = experiment.initial_state(), []
    with jax.set_mesh(experiment.mesh):
      step = experiment.train_step.__wrapped__.lower(state, batches[0]).compile()
    for batch in batches:
      state, metrics = step(state, batch)
      seen.append([float(metrics[f"train/{name}"]) for name in ("loss", "grad_norm", "param_norm")])
    return step.as_text(), seen

  batches = tiny.batches(3)
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_onednn=false")
  text, by_eigen = run()
  assert "__onednn_fusion" not in text
  monkeypatch.delenv("XLA_FLAGS")
  text, by_onednn = run()
  assert ("__onednn_fusion" in text) == ON_X86
  np.testing.assert_allclose(by_onednn, by_eigen, rtol=1e-5)


def test_an_option_an_xla_does_not_know_is_left_out(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS")
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
