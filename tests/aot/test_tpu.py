"""The real training step, compiled for TPUs that are not there: pip install '.[test,tpu]'.

`pytest` alone does not run these; `pytest tests/aot` does, in minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jepax.planning import aot, environment, targets

ROOT = Path(__file__).parents[2]
IMAGENET_22K = "--examples=14_197_122"


def plan(config: str, topology: str, *arguments: str) -> dict:
  """What `python -m jepax.plan --json` says."""
  command = [sys.executable, "-m", "jepax.plan", f"--config=configs/{config}"]
  done = subprocess.run(
    [*command, f"--topology={topology}", "--json", *arguments],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=1800,
  )
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  print(config, topology, f"{found['compile_seconds']:.0f} s", found["memory"])
  return found


@pytest.mark.parametrize(
  ("config", "topology", "devices", "most"),
  [
    ("ijepa_vitb.py", "v5e:4x4", 16, 10.0),
    ("ijepa_vith14.py", "v5e:16x16", 256, 13.5),
    ("ijepa_vitg16.py", f"v5p:8x8x8 {IMAGENET_22K}", 512, 21.0),
    ("ijepa_vith14.py", "v5e:16x16 --config.mesh.fsdp=16", 256, 13.5),
  ],
)
def test_recipes_fit_and_communicate_as_they_should(config, topology, devices, most):
  """most: GiB, a twentieth above what was measured: an activation kept twice is more."""
  found = plan(config, *topology.split(), "--nolargest")
  assert found["devices"] == found["chips"] == devices
  assert found["fits"]
  assert 0 < found["memory"]["peak"] <= found["needed"] < found["chip"]["memory"]
  assert found["needed"] < most * 2**30
  assert found["rematerialised"] == []
  assert "all-reduce" in found["collectives"]  # the gradients
  assert not {"all-to-all", "ragged-all-to-all"} & set(found["collectives"])
  split = "fsdp" in topology
  assert ("all-gather" in found["collectives"]) == split  # parameters, and nothing else
  assert found["memory"]["aliased"] > 0.99 * found["memory"]["outputs"]  # the state is donated


def test_too_large_a_batch_does_not_fit():
  found = plan("quickstart.py", "v5e:2x2", "--examples=10_000_000", "--config.batch_size=100_000")
  largest = found["largest"]
  assert found["fits"] is False and found["memory"] is None
  assert found["needed"] > found["capacity"] == found["chip"]["memory"]
  assert 0 < largest["fits"] < largest["fails"] < 100_000
  assert largest["fails"] - largest["fits"] <= 0.1 * largest["fits"]


@pytest.fixture
def target(monkeypatch):
  for name, value in environment.variables("v5e:4x4").items():
    monkeypatch.setenv(name, value)
  jax.config.update("jax_disable_most_optimizations", False)  # as users compile
  yield targets.find("v5e:4x4")
  jax.config.update("jax_disable_most_optimizations", True)


def test_rematerialisation_is_noticed(target):
  """A placement that the partitioner can't reach directly; else the plans' silence says nothing."""
  mesh = jax.sharding.Mesh(np.array(target.devices).reshape(2, 2, 4), ("a", "b", "c"))
  first = NamedSharding(mesh, PartitionSpec("b", ("a", "c")))
  last = NamedSharding(mesh, PartitionSpec("c", None, "a"))

  def move(x):
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x * 2, first), last)

  step = jax.jit(move, in_shardings=first, out_shardings=last)
  with aot.stderr() as lines:
    step.lower(jax.ShapeDtypeStruct((64, 32, 16), np.float32)).compile()
  assert any(aot.REMATERIALISATION in line for line in lines)


@pytest.mark.parametrize(
  ("topology", "devices", "chips"),
  [("v4:2x2x1", 4, 4), ("v5e:2x2", 4, 4), ("v5p:2x2x1", 4, 4), ("v6e:2x2", 4, 4),
   ("tpu7x:2x2x1", 8, 4)],
)  # fmt: skip
def test_memory_of_the_chips_is_what_the_compiler_says(target, topology, devices, chips):
  found = targets.find(topology)
  assert (len(found.devices), found.chips) == (devices, chips)
  here = jax.sharding.SingleDeviceSharding(found.devices[0])
  square = jax.jit(lambda x: x @ x + x.T, in_shardings=here, out_shardings=here)
  with pytest.raises(jax.errors.JaxRuntimeError) as caught, aot.stderr():
    square.lower(jax.ShapeDtypeStruct((400_000, 400_000), np.float32)).compile()
  assert aot._shortage(str(caught.value))[1] == found.chip.memory


@pytest.mark.parametrize("topology", ["v5e:3x5", "v5e", "v5e:axb"])
def test_topologies_that_are_not(topology):
  with pytest.raises(ValueError, match=f"--topology={topology}"):
    targets.find(topology)
