"""Saving, restoring, refusing and stopping."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jepax import checkpoint
from jepax.checkpoint import Checkpoints, Preemption
from jepax.core import TrainState

META = {"data": {"position": 7}, "config": {"optim": {"lr": 1e-3}}, "code": {"commit": None}}


def make_state(seed: int = 0, *, width: int = 4) -> TrainState:
  """A state with all that optax and the methods put into one: named tuples, empties, scalars."""
  random = np.random.default_rng(seed)
  kernel = jnp.asarray(random.normal(size=(8, width)), jnp.float32)
  # Values that equality would confuse or lose: the test compares bits.
  kernel = kernel.at[0, :3].set(jnp.array([jnp.nan, -0.0, jnp.inf]))
  params = {"encoder": {"kernel": kernel, "bias": jnp.ones(width, jnp.bfloat16) / 3}}
  mask = {"encoder": {"kernel": True, "bias": False}}
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.add_decayed_weights(1e-2), mask),
    optax.adam(1e-3),
  )
  return TrainState(
    step=jnp.asarray(seed, jnp.int32),
    params=params,
    carry={"target": params, "queue": (jnp.arange(16, dtype=jnp.int8),), "none": {}},
    opt_state=tx.init(params),
    key=jax.random.key_data(jax.random.key(seed)),
    skipped=jnp.zeros((2,), jnp.int32),
  )


def abstract(state, sharding=None):
  """What to restore: on one device, or with `sharding(leaf)`."""
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = sharding or (lambda x: one)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def test_round_trip_is_bitwise_on_this_mesh_and_on_another(tmp_path):
  def rows(devices):
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,))
    return lambda x: NamedSharding(mesh, P("fsdp") if x.ndim and x.shape[0] % 8 == 0 else P())

  state = make_state(3)
  sharded = jax.tree.map(lambda x: jax.device_put(x, rows(8)(x)), state)
  with Checkpoints(tmp_path / "ckpt", every=1, keep=1) as checkpoints:
    assert checkpoints.save(3, sharded, meta=META)
    for devices in (8, 2, 1):
      restored, meta = checkpoints.restore(abstract(state, rows(devices)))
      assert_same_bits(restored, state)
      assert meta == META
      assert restored.params["encoder"]["kernel"].sharding.num_devices == devices


def test_every_force_keep_and_existing_steps(tmp_path):
  with Checkpoints(tmp_path, every=2, keep=2) as checkpoints:
    assert checkpoints.latest() is None
    saved = [checkpoints.save(n, make_state(n), meta={"n": n}) for n in range(1, 7)]
    assert saved == [False, True, False, True, False, True]
    assert not checkpoints.save(6, make_state(0), meta={"n": 0}, force=True)
    assert checkpoints.save(7, make_state(7), meta={"n": 7}, force=True)
    assert checkpoints.latest() == 7
    assert checkpoints.meta() == {"n": 7}
    assert checkpoints.meta(6) == {"n": 6}
    state, _ = checkpoints.restore(abstract(make_state()), step=6)
    assert_same_bits(state, make_state(6))
    with pytest.raises(FileNotFoundError, match=r"no step 4, only \[6, 7\]"):
      checkpoints.meta(4)


def test_a_save_in_flight_is_not_touched_by_a_donated_step(tmp_path):
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((1 << 22,), jnp.float32)  # 16 MiB: the write outlasts the next steps
  with Checkpoints(tmp_path, every=1, keep=1) as checkpoints:
    checkpoints.save(1, {"x": x}, meta={})
    for _ in range(3):
      x = step(x)
    restored, _ = checkpoints.restore(abstract({"x": x}))
  assert float(jnp.abs(restored["x"]).max()) == 0.0
  assert float(x[0]) == 3.0


def test_read_only_leaves_a_running_save_alone(tmp_path):
  directory = tmp_path / "ckpt"
  with pytest.raises(FileNotFoundError, match="does not exist"):
    Checkpoints(directory)
  with Checkpoints(directory, every=1, keep=3) as writer:
    writer.save(1, make_state(1), meta={"n": 1})
    writer.wait()
    (directory / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(directory) as reader:
      assert reader.latest() == 1
      assert reader.meta() == {"n": 1}
      with pytest.raises(ValueError, match="opened to read"):
        reader.save(3, make_state(3), meta={})
      writer.save(3, make_state(3), meta={"n": 3})
      writer.wait()
      assert reader.latest() == 3
    assert (directory / "2.orbax-checkpoint-tmp").exists()


def test_unfinished_steps_and_leftovers_go_when_training_resumes(tmp_path):
  with Checkpoints(tmp_path, every=1, keep=3) as checkpoints:
    checkpoints.save(1, make_state(1), meta={"n": 1})
  (tmp_path / "2").mkdir()
  (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
  with Checkpoints(tmp_path, every=1, keep=3) as checkpoints:
    assert checkpoints.latest() == 1
    assert checkpoints.save(2, make_state(2), meta={"n": 2})
    assert checkpoints.latest() == 2
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_mismatch_names_the_leaves(tmp_path):
  with Checkpoints(tmp_path, every=1, keep=1) as checkpoints:
    checkpoints.save(1, make_state(), meta={})
    other = make_state(width=5)
    other.params["extra"] = jnp.zeros(2)
    del other.params["encoder"]["bias"]
    with pytest.raises(ValueError) as error:
      checkpoints.restore(abstract(other))
    message = str(error.value)
    assert "params/encoder/kernel: saved float32[8, 4], expected float32[8, 5]" in message
    assert "params/extra: saved nothing, expected float32[2]" in message
    assert "params/encoder/bias: saved bfloat16[4], expected nothing" in message
    other = make_state()
    other.params["encoder"]["bias"] = other.params["encoder"]["bias"].astype(jnp.float32)
    with pytest.raises(ValueError, match=r"bias: saved bfloat16\[4\], expected float32\[4\]"):
      checkpoints.restore(abstract(other))
    with pytest.raises(ValueError, match=r"needs a sharding for every leaf, found none for step"):
      checkpoints.restore(jax.eval_shape(make_state))


def test_a_damaged_step_is_named_with_what_to_do(tmp_path):
  # One array: of several, Orbax leaves the other reads running when the first one fails.
  whole = {"kernel": jnp.arange(4096.0)}
  with Checkpoints(tmp_path, every=1, keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, whole, meta=META)
    checkpoints.wait()
    arrays = [p for p in (tmp_path / "2" / "state").rglob("d/*") if p.is_file()]
    for path in arrays:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = rf"(?s)step 2 can't be read .*remove {tmp_path / '2'} .*there are \[1, 2\]"
    with pytest.raises(ValueError, match=message):
      checkpoints.restore(abstract(whole))
  shutil.rmtree(tmp_path / "2")
  with Checkpoints(tmp_path, every=1, keep=2) as checkpoints:
    assert_same_bits(checkpoints.restore(abstract(whole))[0], whole)


def test_bad_arguments(tmp_path):
  for every, keep in ((0, 1), (1, 0), (None, 1), (1, None)):
    with pytest.raises(ValueError, match="at least 1"):
      Checkpoints(tmp_path, every=every, keep=keep)
  with Checkpoints(tmp_path / "empty", every=1, keep=1) as checkpoints:
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
      checkpoints.restore(abstract(make_state()))
    with pytest.raises(TypeError, match="JSON"):
      checkpoints.save(1, make_state(), meta={"config": object()})


def test_storage_that_fails_is_an_os_error(tmp_path, monkeypatch):
  """TensorStore says ValueError, which elsewhere is a mistake of whoever started the run."""

  def refuse(*_, **__):
    raise ValueError("UNAVAILABLE: error writing params.kernel")

  with Checkpoints(tmp_path, every=1, keep=1) as checkpoints:
    monkeypatch.setattr(checkpoints._manager, "save", refuse)
    with pytest.raises(OSError, match="a checkpoint can't be written: UNAVAILABLE"):
      checkpoints.save(1, make_state(), meta={})


CRASH = """
  import sys
  import jax, jax.numpy as jnp
  from jepax.checkpoint import Checkpoints
  state = {f"w{i}": jnp.zeros((1 << 18,)) for i in range(8)}
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with Checkpoints(sys.argv[1], every=1, keep=2) as checkpoints:
    start = checkpoints.latest() or 0
    if start:
      want = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=one) for k, v in state.items()}
      state, meta = checkpoints.restore(want)
      assert meta["step"] == start
      assert all((v == start).all() for v in state.values())
    print("start", start, flush=True)
    for step in range(start + 1, start + int(sys.argv[2]) + 1):
      state = {k: jnp.full_like(v, step) for k, v in state.items()}
      checkpoints.save(step, state, meta={"step": step})
"""


def spawn(code: str, *args) -> subprocess.Popen:
  command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, args)]
  env = os.environ | quick.ENVIRONMENT
  return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def test_kill_in_mid_save_loses_only_the_save_in_flight(tmp_path):
  """Three runs are killed while files are half written; each goes on from a whole step."""
  starts = []
  for _ in range(3):
    process = spawn(CRASH, tmp_path, 1_000_000)
    starts.append(int(process.stdout.readline().split()[1]))
    deadline = time.monotonic() + 20
    while not any(int(p.name.split(".")[0]) > starts[-1] + 2 for p in tmp_path.glob("*tmp*")):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.001)
    process.kill()
    process.communicate()
  last = spawn(CRASH, tmp_path, 1)
  output, _ = last.communicate(timeout=60)
  assert last.returncode == 0
  starts.append(int(output.split()[1]))
  assert all(later > earlier for earlier, later in itertools.pairwise(starts)), starts
  assert not list(tmp_path.glob("*tmp*"))


def test_diff_names_dotted_keys():
  saved = {"optim": {"lr": 1e-3, "betas": (0.9, 0.95)}, "data": {"name": "a"}, "old": {}}
  now = {"optim": {"lr": 2e-3, "betas": [0.9, 0.95]}, "data": {"name": "b"}, "new": None}
  assert checkpoint.diff(saved, saved) == []
  assert checkpoint.diff(saved, now) == [
    "data.name: saved 'a', now 'b'",
    "new: saved absent, now None",
    "old: saved {}, now absent",
    "optim.lr: saved 0.001, now 0.002",
  ]
  assert checkpoint.diff(saved, now, ignore=("optim.lr", "data", "old", "new")) == []
  assert len(checkpoint.diff(saved, now, ignore=("dat", "optim.l"))) == 4  # keys, not spellings


def test_guard(tmp_path):
  config = {"optim": {"lr": 1e-3}, "steps": 10, "sizes": (1, 2)}
  workdir = tmp_path / "a" / "run"
  checkpoint.guard(workdir, config)
  assert json.loads((workdir / "config.json").read_text()) == {**config, "sizes": [1, 2]}
  (workdir / "metrics.jsonl").write_text("")
  checkpoint.guard(workdir, config)
  checkpoint.guard(workdir, {**config, "steps": 20}, ignore=("steps",))
  assert json.loads((workdir / "config.json").read_text())["steps"] == 20
  with pytest.raises(ValueError, match=r"optim.lr: saved 0.001, now 0.1\n.*--workdir"):
    checkpoint.guard(workdir, {**config, "optim": {"lr": 0.1}}, ignore=("steps",))


def test_guard_takes_a_key_that_an_older_jepax_lacked_for_its_default(tmp_path):
  checkpoint.guard(tmp_path, {"optim": {"lr": 0.1}})
  now = {"optim": {"lr": 0.1, "frozen": "encoder"}, "init": {"weights": ""}}
  defaults = {"optim": {"lr": 1e-3, "frozen": ""}, "init": {"weights": ""}, "gone": 1}
  with pytest.raises(ValueError, match=r"config:\n  optim.frozen: saved '', now 'encoder'\n"):
    checkpoint.guard(tmp_path, now, defaults=defaults)
  now["optim"]["frozen"] = ""
  checkpoint.guard(tmp_path, now, defaults=defaults)
  assert json.loads((tmp_path / "config.json").read_text()) == now


def test_guard_protects_other_files_and_survives_a_crash(tmp_path):
  (tmp_path / ".config.json.tmp").write_text('{"half')  # killed while claiming
  checkpoint.guard(tmp_path, {"a": 1})
  assert os.listdir(tmp_path) == ["config.json"]
  for name, text in (("thesis.tex", "x"), ("config.json", "[1]"), ("config.json", "{")):
    other = tmp_path.parent / f"other-{len(text)}-{name}"
    other.mkdir()
    (other / name).write_text(text)
    with pytest.raises(ValueError, match=r"not the config of a jepax run|no jepax run"):
      checkpoint.guard(other, {"a": 1})
    assert (other / name).read_text() == text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_sets_the_flag_and_the_second_acts_as_usual(number):
  class Usual(BaseException):
    pass

  def usual(*_):
    raise Usual

  before = signal.signal(number, usual)
  try:
    with Preemption() as preemption:
      assert not preemption.requested and not preemption.reached(1)
      os.kill(os.getpid(), number)
      assert preemption.requested and preemption.reached(2)
      with pytest.raises(Usual):
        os.kill(os.getpid(), number)
    with Preemption():
      assert signal.getsignal(number) is not usual
    assert signal.getsignal(number) is usual
  finally:
    signal.signal(number, before)


PREEMPT = """
  import os, signal, sys, time
  import jax
  jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
  from jepax.checkpoint import Preemption
  with Preemption() as preemption:
    for step in range(1, 600):
      time.sleep(0.05)
      if step == 3 and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
      if preemption.reached(step):
        break
  print(step, preemption.requested)
"""


def test_two_processes_stop_at_the_same_step():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  processes = [spawn(PREEMPT, address, n) for n in range(2)]
  outputs = [process.communicate(timeout=50)[0].split() for process in processes]
  assert outputs[0] == outputs[1] and outputs[0][1] == "True"
  assert 3 <= int(outputs[0][0]) < 599
