"""Eight simulated CPU devices for every test, set before JAX is imported."""

import os

import quick

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", quick.XLA_FLAGS]
)

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compile():
  """Few of XLA's passes, too: for tiny models that run a few steps."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
