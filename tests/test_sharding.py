"""Meshes, where parameters lie, and what constrains activations; on eight simulated devices."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jepax import optim, sharding
from jepax.config import base
from jepax.core import TrainState

ROWS = P(("data", "fsdp"))


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(data=2, fsdp=4)


@pytest.mark.parametrize(
  "sizes, shape",
  [
    ({}, (8, 1)),
    ({"fsdp": 8}, (1, 8)),
    ({"fsdp": 2}, (4, 2)),
    ({"data": 2, "fsdp": -1}, (2, 4)),
    ({"data": 4, "fsdp": 2}, (4, 2)),
  ],
)
def test_mesh_takes_all_devices(sizes, shape):
  mesh = sharding.make_mesh(**sizes)
  assert mesh.axis_names == ("data", "fsdp") and mesh.devices.shape == shape


def test_one_device_is_a_mesh_of_one():
  mesh = sharding.make_mesh(devices=jax.devices()[3:4])
  assert mesh.devices.tolist() == [[jax.devices()[3]]]


@pytest.mark.parametrize(
  "sizes",
  [{"fsdp": 3}, {"data": 2, "fsdp": 2}, {"data": -1, "fsdp": -1}, {"fsdp": 0}, {"data": -2}],
)
def test_mesh_errors(sizes):
  found = {"data": -1, "fsdp": 1} | sizes
  message = rf"data={found['data']}, fsdp={found['fsdp']} does not fit 8 device\(s\).*must be 8"
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes)


def place(mesh, **shapes) -> dict:
  """Partition specs of parameters of these shapes."""
  tree = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
  return {k: v.spec for k, v in sharding.state_shardings(mesh, {"params": tree})["params"].items()}


def test_the_largest_axis_that_divides_is_split(mesh):
  assert place(mesh, tall=(256, 64), wide=(64, 256), odd=(2050, 64), deep=(3, 3, 128, 64)) == {
    "tall": P("fsdp"),
    "wide": P(None, "fsdp"),
    "odd": P(None, "fsdp"),  # 2050 is larger but not a multiple of 4
    "deep": P(None, None, "fsdp"),
  }


def test_what_is_small_or_indivisible_is_replicated(mesh):
  large = sharding.MIN_SHARDED_SIZE
  found = place(mesh, below=(4, large // 4 - 1), at=(4, large // 4), odd=(99, 101), scalar=())
  assert found == {"below": P(), "at": P(None, "fsdp"), "odd": P(), "scalar": P()}


def test_without_fsdp_all_is_replicated():
  assert place(sharding.make_mesh(), tall=(4096, 64)) == {"tall": P()}


def test_the_layer_axis_of_a_scanned_stack_is_never_split(mesh):
  leaf = jax.ShapeDtypeStruct((512, 16, 8), np.float32)
  tree = {"blocks": {"kernel": leaf}, "block0": {"kernel": leaf}}
  found = sharding.state_shardings(mesh, tree)
  assert found["blocks"]["kernel"].spec == P(None, "fsdp")
  assert found["block0"]["kernel"].spec == P("fsdp")
  indivisible = {"blocks": {"bias": jax.ShapeDtypeStruct((512, 99), np.float32)}}
  assert sharding.state_shardings(mesh, indivisible)["blocks"]["bias"].spec == P()


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_target_and_moments_lie_as_their_parameter(mesh, name):
  config = base().optim
  config.name, config.clip = name, 1.0
  tx = optim.build(config, steps=10, warmup=1).tx

  def init():
    params = {
      "embed": {"kernel": jnp.zeros((128, 64)), "bias": jnp.zeros(64)},
      "blocks": {"qkv": {"kernel": jnp.zeros((8, 32, 96)), "bias": jnp.zeros((8, 96))}},
    }
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, {"target": params}, tx.init(params), jnp.zeros(2), zero)

  state = jax.eval_shape(init)
  found = sharding.state_shardings(mesh, state)
  expected = found.params
  assert expected["embed"]["kernel"].spec == P("fsdp")
  assert expected["blocks"]["qkv"]["kernel"].spec == P(None, None, "fsdp")
  assert found.carry["target"] == expected
  leaves = jax.tree.leaves(found.opt_state, is_leaf=lambda x: isinstance(x, dict))
  moments = [tree for tree in leaves if isinstance(tree, dict)]
  assert len(moments) == {"adamw": 2, "lars": 1}[name]
  assert all(tree == expected for tree in moments)
  assert found.step.spec == P() and found.key.spec == P()


def test_rows_lie_over_every_device(mesh):
  x = {"image": np.arange(16 * 3).reshape(16, 3)}
  placed = sharding.global_batch(x, sharding.batch_sharding(mesh))["image"]
  assert placed.sharding.spec == ROWS
  np.testing.assert_array_equal(placed, x["image"])
  assert {s.data.shape for s in placed.addressable_shards} == {(2, 3)}
  whole = jax.device_put(x["image"], sharding.replicated(mesh))
  assert {s.data.shape for s in whole.addressable_shards} == {(16, 3)}


def constrained(x) -> str:
  return str(jax.make_jaxpr(sharding.constrain)(x))


def test_constrain_is_nothing_outside_a_mesh():
  x = jnp.ones((8, 3))
  assert sharding.constrain(x) is x
  assert "sharding_constraint" not in constrained(x)


def test_constrain_splits_rows_inside_a_mesh(mesh):
  with jax.set_mesh(mesh):
    x = jax.jit(lambda: sharding.constrain(jnp.ones((8, 3))))()
    assert x.sharding.spec == ROWS
    assert "sharding_constraint" in constrained(x)
    # Rows that don't divide, as of a probe's last batch, stay as they are.
    assert "sharding_constraint" not in constrained(jnp.ones((6, 3)))


def test_constrain_leaves_another_mesh_alone():
  other = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(other):
    assert "sharding_constraint" not in constrained(jnp.ones((8, 3)))


@pytest.mark.parametrize(
  ("rows", "count", "cores", "expected"),
  [(32, 0, 2, 2), (32, 0, 16, 4), (33, 0, 16, 3), (7, 0, 8, 1), (32, 5, 2, 5), (0, 0, 2, 1)],
)
def test_cores_become_devices(monkeypatch, rows, count, cores, expected):
  """At least 8 rows a device, a number that divides the rows; a given count is taken as it is."""
  set_to = {}
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
  monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
  sharding.use_all_cores(rows=rows, count=count)
  assert set_to == {"jax_num_cpu_devices": expected}


def test_the_users_number_of_devices_is_kept(monkeypatch):
  """XLA_FLAGS has a number already, as in these tests; a negative one is refused."""
  monkeypatch.setattr(jax.config, "update", None)
  sharding.use_all_cores(rows=32)
  with pytest.raises(ValueError, match="cpu_devices=-1"):
    sharding.use_all_cores(rows=32, count=-1)
