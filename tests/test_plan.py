"""Plans: HLO text, the search, targets, and the command line on a described CPU mesh."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from jepax import config as config_lib
from jepax import sharding
from jepax.planning import aot, environment, hlo, plan, search, targets

ROOT = Path(__file__).parent.parent
ROWS = jax.sharding.PartitionSpec("data")

HLO = """
HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%gathered (p: bf16[1,128,64]) -> bf16[8,128,64] {
  %p = bf16[1,128,64]{2,1,0} parameter(0)
  ROOT %all-gather.9 = bf16[8,128,64]{2,1,0:T(8,128)(2,1)} all-gather(%p), dimensions={0}
}

%body.2 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.3 = (f32[8]{0:T(1024)}, /*index=1*/s8[3]{0}) all-reduce(%x, %y), to_apply=%add.1
  %fusion.4 = bf16[8,128,64]{2,1,0} fusion(%x), kind=kCustom, calls=%gathered
}

%cond.5 (t: (s32[], f32[8])) -> pred[] {
  %constant.6 = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.6), direction=LT
}

ENTRY %main.7 (x: f32[8]) -> f32[8] {
  %while.8 = (s32[]{:T(128)}, f32[8]{0}) while(%t), condition=%cond.5, body=%body.2
  %cps = (f32[40]{0}, f32[40]{0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
  %cpd = f32[40]{0} collective-permute-done(%cps)
  ROOT %out = f32[8]{0} get-tuple-element(%while.8), index=1
}
"""


def test_collectives_of_a_text():
  """In tuples, fusions and loops; a start and its done are one."""
  assert hlo.collectives(HLO) == {
    "all-reduce": hlo.Traffic(32, 32 * (8 * 4 + 3)),
    "all-gather": hlo.Traffic(32, 32 * 8 * 128 * 64 * 2),
    "collective-permute": hlo.Traffic(1, 160),
  }


def test_a_loop_whose_length_the_compiler_knows():
  known = HLO.replace("body=%body.2", 'body=%body.2, backend_config={"known_trip_count":{"n":"5"}}')
  assert hlo.collectives(known)["all-reduce"].count == 5


def test_collectives_of_a_program():
  """What XLA compiles for eight CPU devices: sums over the rows, three of them in a loop."""
  mesh = sharding.make_mesh()

  def body(_, total):
    return total + jax.lax.psum(jnp.sin(total), "data")

  def f(x):
    return jax.lax.psum(jax.lax.fori_loop(0, 3, body, x), "data")

  step = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=ROWS, out_specs=ROWS, check_vma=False))
  text = step.lower(jax.ShapeDtypeStruct((8, 32), np.float32)).compile().as_text()
  assert hlo.collectives(text) == {"all-reduce": hlo.Traffic(4, 4 * 32 * 4)}


def line(batch: int) -> float:
  return 4.0 + 0.01 * batch


def bent(batch: int) -> float:
  """Padding makes steps, and workspace grows faster than the batch."""
  return 4.0 + 0.004 * (batch // 100) * 100 + 1e-6 * batch**2


@pytest.mark.parametrize("need", [line, bent])
@pytest.mark.parametrize("known", [32, 480, 1216, 3200, 12_800])
def test_search_brackets_the_largest_batch(need, known):
  tried = search.largest(
    need, capacity=16.0, known={known: need(known)}, base=4.0, unit=32, most=10**6
  )
  fits, fails = search.bracket(tried, capacity=16.0)
  assert need(fits) <= 16.0 < need(fails)
  assert fails - fits <= max(32, search.CLOSE * fits)
  assert all(batch % 32 == 0 for batch in tried)
  assert len(tried) <= 7  # of which one was known


def test_search_ends_at_the_number_of_images():
  tried = search.largest(line, capacity=1e9, known={32: line(32)}, base=4.0, unit=32, most=1000)
  assert search.bracket(tried, capacity=1e9) == (992, None)


def test_search_where_nothing_fits():
  tried = search.largest(line, capacity=3.0, known={320: line(320)}, base=4.0, unit=32, most=1000)
  assert search.bracket(tried, capacity=3.0) == (0, 32)


@pytest.mark.parametrize(
  ("message", "expected"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
      "(1.16T) exceeds available HBM (15.75G).",
      (1.16 * 2**40, 15.75 * 2**30),
    ),
    ("XLA:TPU compile permanent error. Used 19.5G of 15.75G hbm.", (19.5 * 2**30, 15.75 * 2**30)),
    ("INVALID_ARGUMENT: something else", None),
  ],
)
def test_shortage(message, expected):
  assert aot._shortage(message) == expected


def test_stderr_of_other_languages_is_collected():
  with aot.stderr() as lines:
    os.write(2, b"from C++\n")
  assert lines == ["from C++"]


@pytest.mark.parametrize(
  ("topology", "slices", "message"),
  [
    ("v9:2x2", 1, "--topology='v9' is unknown"),
    ("cpu:many", 1, "write cpu:DEVICES"),
    ("cpu:64", 1, "JAX_NUM_CPU_DEVICES=64"),
    ("h100:8", 1, "write h100:HOSTSxGPUS"),
    ("cpu:8", 2, "--slices=2: TPUs alone"),
  ],
)
def test_targets_that_are_not(topology, slices, message):
  with pytest.raises(ValueError, match=message):
    targets.find(topology, slices=slices)


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "tpu"), ("h100:1x8", "cuda")])
def test_a_missing_compiler_is_named(monkeypatch, topology, extra):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=rf"not installed.*pip install 'jepax\[{extra}\]'"):
    targets.find(topology)


def test_every_kind_has_its_environment():
  for kind in targets.KINDS:
    assert environment.variables(f"{kind}:2")["JAX_PLATFORMS"] == "cpu"
  assert set(environment.TPU_KINDS) == set(targets.TPUS)


def imagenet(**data) -> config_lib.ConfigDict:
  config = config_lib.base()
  config.data.update(source="tfds", name="imagenet2012")
  config.data.update(data)
  return config


def test_images_are_counted_without_reading():
  assert plan.examples_of(imagenet(), None) == 1_281_167
  assert plan.examples_of(imagenet(), 77) == 77
  assert plan.examples_of(config_lib.base(), None) == plan.EMBEDDED_IMAGES
  for unknown in (dict(name="my_set"), dict(train_split="train[:10%]"), dict(source="folder")):
    with pytest.raises(ValueError, match="--examples=N"):
      plan.examples_of(imagenet(**unknown), None)


def test_the_embedded_set_has_the_images_it_is_said_to_have():
  from jepax.data.sources import embedded

  assert len(embedded("train")) == plan.EMBEDDED_IMAGES


@pytest.fixture(scope="module")
def smoke():
  """The quick start's smoke form on 8 devices, parameters split over 4."""
  config = config_lib.load("configs/quickstart.py:smoke", ["mesh.fsdp=4"])
  return plan.make(config, targets.find("cpu:8"))


def test_plan_of_a_smoke_run(smoke):
  assert smoke.mesh["data"] == 2 and smoke.mesh["fsdp"] == 4
  assert smoke.steps == 4 and smoke.examples == 10_000
  assert smoke.fits is None and smoke.chip_hours is None and smoke.largest is None
  assert set(smoke.parameters) == {"encoder", "predictor"}
  assert "all-gather" in smoke.program.collectives  # the split parameters
  memory = smoke.program.memory
  assert memory.aliased > 0.9 * memory.outputs  # the state is donated
  assert memory.needed >= memory.peak > 0


def test_arithmetic_of_a_plan(smoke):
  """Hours at an MFU of a half on a chip with 1 TFLOP/s; and what is too large."""
  chip = targets.Chip("toy", 1e12, 10.0, "")
  target = dataclasses.replace(smoke.target, chip=chip)
  toy = dataclasses.replace(smoke, target=target, mfu=0.5, flops_per_image=1e12)
  assert toy.chip_hours == pytest.approx(toy.batch_size * toy.steps * 2 / 3600)
  assert toy.fits is False
  refused = aot.Program(None, None, (20.0, 30.0), (), 1.0)
  assert dataclasses.replace(toy, program=refused).capacity == 30.0


def test_recomputation_is_no_model_flops():
  """Scanned with rematerialisation or unrolled without: the same number."""
  deep = ["method.encoder.scan=True", "method.encoder.remat=full", "method.encoder.depth=3"]
  flat = ["method.encoder.depth=3"]
  target, counts = targets.find("cpu:1"), []
  for overrides in (deep, flat):
    config = config_lib.load("configs/quickstart.py:smoke", overrides)
    counts.append(plan.step_flops(config, target, 10_000))
  assert counts[0] == counts[1]


def start(*arguments: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "jepax.plan", "--config=configs/quickstart.py:smoke"]
  environment_ = os.environ | quick.ENVIRONMENT
  return subprocess.run(
    [*command, *arguments], cwd=ROOT, env=environment_, capture_output=True, text=True, timeout=300
  )


def test_command_line():
  done = start("--topology=cpu:2", "--json", "--config.batch_size=32")
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert found["devices"] == 2 and found["batch_size"] == 32
  assert found["flops_per_step"] == 32 * found["flops_per_image"]
  assert found["parameters"]["all"] == sum(found["parameters"].values()) / 2
  assert math.isfinite(found["memory"]["peak"])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--topology=gpu:1"], "allowed: ['v4'"),
    (["--topology=cpu:2", "--mfu=40"], "--mfu=40"),
    (["--topology=cpu:3"], "does not divide over 3"),
  ],
)
def test_mistakes_are_one_line(arguments, message):
  done = start(*arguments)
  assert done.returncode == 2
  assert message in done.stderr and "Traceback" not in done.stderr
