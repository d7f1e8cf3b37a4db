"""What holds for every test: eight simulated CPU devices, and little time spent on compiling."""

import gc
import os

import quick

# Before JAX is imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", quick.XLA_FLAGS]
)

import jax

# Few of LLVM's passes, too: the programs are tiny and run a few steps.
jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes many objects that stay; searching them for cycles every 700 is a tenth of its time.
gc.set_threshold(100_000, 20, 20)
