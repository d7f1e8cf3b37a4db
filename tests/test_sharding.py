"""Meshes, where parameters lie, and what constrains activations; on eight simulated devices."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jepax import optim, sharding
from jepax.config import base
from jepax.core import TrainState
from jepax.experiment import prepare

ROWS = P(("data", "fsdp"))


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(data=2, fsdp=4)


@pytest.mark.parametrize(
  "sizes, shape",
  [
    ({}, (8, 1, 1)),
    ({"fsdp": 8}, (1, 8, 1)),
    ({"fsdp": 2}, (4, 2, 1)),
    ({"data": 2, "fsdp": -1}, (2, 4, 1)),
    ({"data": 4, "fsdp": 2}, (4, 2, 1)),
    ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ({"data": 1, "tensor": 4, "fsdp": -1}, (1, 2, 4)),
  ],
)
def test_mesh_takes_all_devices(sizes, shape):
  mesh = sharding.make_mesh(**sizes)
  assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape


def test_one_device_is_a_mesh_of_one():
  mesh = sharding.make_mesh(devices=jax.devices()[3:4])
  assert mesh.devices.tolist() == [[[jax.devices()[3]]]]


@pytest.mark.parametrize(
  "sizes",
  [
    *({"fsdp": 3}, {"data": 2, "fsdp": 2}, {"data": -1, "fsdp": -1}, {"fsdp": 0}, {"data": -2}),
    *({"tensor": 3}, {"tensor": 0}, {"tensor": 16}),
  ],
)
def test_mesh_errors(sizes):
  found = {"data": -1, "fsdp": 1, "tensor": 1} | sizes
  sizes_in_words = ", ".join(f"{axis}={size}" for axis, size in found.items())
  message = rf"{sizes_in_words} does not fit 8 device\(s\).*must be 8"
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of one of several slices."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "gpu"
  device_kind: str = "chip"


def test_data_spans_slices_and_the_rest_stays_inside(caplog):
  chips = [Chip(id=i, slice_index=i % 2) for i in range(8)]
  mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=chips)
  assert mesh.devices.shape == (2, 2, 2)
  assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{0}, {1}]
  assert not caplog.records
  wide = sharding.make_mesh(fsdp=8, devices=chips)  # as asked for, with a word of warning
  assert [chip.slice_index for chip in wide.devices.flat] == [0] * 4 + [1] * 4
  assert "cross the slow network" in caplog.text


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


BLOCK = {
  "qkv": {"kernel": (64, 192), "bias": (192,)},
  "proj": {"kernel": (64, 64), "bias": (64,)},
  "fc1": {"kernel": (64, 256), "bias": (256,)},
  "fc2": {"kernel": (256, 64), "bias": (64,)},
  "norm1": {"scale": (64,)},
}


@pytest.mark.parametrize(("name", "before"), [("block3", ()), ("blocks", (12,))])
def test_blocks_are_split_over_tensor(name, before):
  """Outputs of qkv and fc1, inputs of proj and fc2; fsdp takes another axis of the same leaf."""
  shapes = {k: {n: before + s for n, s in leaves.items()} for k, leaves in BLOCK.items()}
  tree = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  # `proj` outside a block is the projection to the encoder's width: no part of the rules.
  outside = {"proj": {"kernel": jax.ShapeDtypeStruct((64, 256), np.float32)}}
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  found = sharding.state_shardings(mesh, {"t": {name: tree}, **outside})
  layer = (None,) * len(before)
  expected = {
    "qkv": {"kernel": P(*layer, "fsdp", "tensor"), "bias": P(*layer, "tensor")},
    "proj": {"kernel": P(*layer, "tensor", "fsdp"), "bias": P()},
    "fc1": {"kernel": P(*layer, "fsdp", "tensor"), "bias": P(*layer, "tensor")},
    "fc2": {"kernel": P(*layer, "tensor", "fsdp"), "bias": P()},
    "norm1": {"scale": P()},
  }
  assert jax.tree.map(lambda s: s.spec, found["t"][name]) == expected
  assert found["proj"]["kernel"].spec == P(None, "fsdp")


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


def test_rows_of_a_process_need_not_be_neighbours():
  """Devices of one process hold rows in their mesh's order; here that is all of them, sorted."""
  mesh = jax.sharding.Mesh(np.array(jax.devices())[[4, 0, 5, 1, 6, 2, 7, 3]], ("data",))
  rows = jax.sharding.NamedSharding(mesh, P("data"))
  assert sharding.local_rows(rows, count=16).tolist() == list(range(16))

  class Mine:  # the sharding as a process sees it that has the devices 0 to 3
    def addressable_devices_indices_map(self, shape):
      every = rows.devices_indices_map(shape)
      return {device: index for device, index in every.items() if device.id < 4}

  assert sharding.local_rows(Mine(), count=16).tolist() == [2, 3, 6, 7, 10, 11, 14, 15]


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


def test_constrain_splits_an_axis_over_tensor():
  x = jnp.ones((8, 5, 4))
  with jax.set_mesh(sharding.make_mesh(fsdp=2, tensor=2)):
    y = jax.jit(lambda: sharding.constrain(x, split=-1))()
    assert y.sharding.spec == P(("data", "fsdp"), None, "tensor")
    assert jax.jit(lambda: sharding.constrain(x))().sharding.spec == ROWS
    # Rows that don't divide are left alone, heads that don't are an error.
    assert jax.jit(lambda: sharding.constrain(x[:3], split=2))().sharding.spec[2] == "tensor"
    with pytest.raises(ValueError, match=r"mesh.tensor=2 does not divide the 5 heads"):
      sharding.constrain(x, split=1)


def test_tensor_moves_no_activation_from_device_to_device(capfd):
  """The compiled step has no all-to-all, and XLA falls back to no full rematerialisation."""
  config = tiny.config("ijepa")
  with config.unlocked():
    config.method.encoder = tiny.ENCODER | dict(depth=2, scan=True, activation="swiglu")
    config.method.predictor = dict(width=16, depth=1, heads=2)
  mesh = sharding.make_mesh(fsdp=2, tensor=2)
  run = prepare(config, data=tiny.data(), mesh=mesh)
  images = jax.ShapeDtypeStruct((tiny.BATCH, 16, 16, 1), np.uint8, sharding=run.batch_sharding)
  with jax.set_mesh(mesh):
    step = run.train_step.__wrapped__.lower(run.abstract_state, {"image": images}).compile()
  program = step.as_text()
  assert "all-reduce" in program and "all-to-all" not in program
  assert "rematerialization" not in capfd.readouterr().err


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
