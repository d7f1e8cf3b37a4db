"""What makes XLA compile quickly for a CPU: that is most of the time of most tests."""

import importlib.metadata

# Simpler code, in one piece, and no code of oneDNN's for each matrix product (test_compiler.py has
# that). XLA ends at a flag it doesn't know, so no other release gets them.
XLA_FLAGS = ""
if importlib.metadata.version("jaxlib").startswith("0.10."):
  XLA_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_cpu_use_onednn=false"
  )

# Of a process of its own, which starts once (jepax.huge_pages).
ENVIRONMENT = {
  "XLA_FLAGS": XLA_FLAGS,
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "GLIBC_TUNABLES": "",
}
