"""The encoder of a run without its data, and the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import quick
import tiny

import jepax.pretrained
from jepax import experiment, fit
from jepax.checkpoint import Checkpoints
from jepax.convert import native, source
from jepax.data.build import Data
from jepax.pretrained import Preprocess

ROOT = Path(__file__).parent.parent
IMAGES = tiny.images(8, seed=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir as training leaves it after 10 steps, and the features of each branch."""
  workdir = tmp_path_factory.mktemp("run")
  config = tiny.config("ijepa", method__encoder__scan=True)
  prepared = experiment.prepare(config, data=tiny.data())
  rng = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: jax.device_put((0.2 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding),
    prepared.abstract_state,
  )
  with Checkpoints(workdir / "checkpoints", every=10, keep=1) as saved:
    trainer = fit.Trainer(prepared, None, saved, None, fit.Memory(position=10), workdir)
    saved.save(10, state, meta=trainer.meta())
  encoders = prepared.encoders(state)
  return workdir, {name: encode(IMAGES) for name, encode in encoders.items()}


def listing(folder: Path) -> dict[Path, float]:
  return {path: path.stat().st_mtime for path in folder.rglob("*")}


def test_a_run_gives_the_features_it_trained(run):
  workdir, wanted = run
  before = listing(workdir)
  for branch, features in wanted.items():
    encoder = jepax.pretrained.load(workdir, branch=branch)
    assert encoder.name == branch and encoder.grid == (4, 4)
    # one is scanned over depth and the other not: float32 rounding
    chex.assert_trees_all_close(encoder(IMAGES), features, atol=1e-5)
  assert np.abs(wanted["target"].tokens - wanted["online"].tokens).max() > 0.1
  assert jepax.pretrained.load(workdir).name == "target"  # the method's first
  assert listing(workdir) == before  # read only


def test_the_best_step_of_a_run_that_stops_early(run, tmp_path, monkeypatch):
  """Where early stopping keeps a best step, it is the one that the run's own results are of."""
  asked = []
  meta, read = Checkpoints.meta, Checkpoints.read

  def best(self, step=None):
    found = meta(self, step)
    return found | {"memory": found["memory"] | {"best_step": 5}}

  def note(self, *fields, step=None):
    asked.append((self.directory.name, step))
    return read(self, *fields)

  workdir, _ = run
  (workdir / "best").symlink_to(workdir / "checkpoints")
  monkeypatch.setattr(Checkpoints, "meta", best)
  monkeypatch.setattr(Checkpoints, "read", note)
  weights = source.read(workdir)
  (workdir / "best").unlink()
  assert asked[-1] == ("best", 5) and weights.origin["format"] == "run, step 5"


def test_a_folder_made_of_a_run(run, tmp_path):
  workdir, _ = run
  source.write(source.read(workdir), tmp_path / "out")
  a, b = jepax.pretrained.load(workdir), jepax.pretrained.load(tmp_path / "out")
  chex.assert_trees_all_equal(a.params, b.params)
  assert (a.preprocess, a.module) == (b.preprocess, b.module)


def test_a_run_without_a_checkpoint(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ValueError, match="holds no finished checkpoint; train for longer"):
    source.read(tmp_path)


def test_preprocessing_of_data():
  sized = Preprocess.of(tiny.data())
  assert (sized.size, sized.resize, sized.mean) == ((16, 16), 16, tiny.data().mean)
  images = tiny.images(2)
  np.testing.assert_array_equal(sized.image(images[0]), images[0])  # as it is
  large = Data.from_arrays(np.zeros((4, 32, 48, 3), np.uint8), size=14)
  cut = Preprocess.of(large)
  assert (cut.size, cut.resize, len(cut.mean)) == ((14, 14), 16, 3)


def convert(*arguments) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "jepax.convert", *map(str, arguments)]
  environment = os.environ | quick.ENVIRONMENT
  return subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
  )


def test_command_line(run, tmp_path):
  out = tmp_path / "out"
  done = convert(run[0], out, "--branch=online", "--size=32", "--positions=interpolate")
  assert done.returncode == 0, done.stderr
  assert "online of run, step 10" in done.stdout
  weights = native.read(out)
  assert list(weights.branches) == ["online"] and weights.module.grid == (8, 8)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["SOURCE"], "error: expected SOURCE and OUT"),
    (["nowhere", "OUT"], "error: nowhere holds no weights, there is no such file"),
    (["SOURCE", "OUT", "--size=32"], "Choose positions='interpolate'"),
    (["SOURCE", "OUT", "--branch=teacher"], "branch='teacher' is unknown"),
  ],
)
def test_mistakes(run, tmp_path, arguments, message):
  places = {"SOURCE": run[0], "OUT": tmp_path / "out"}
  done = convert(*(places.get(a, a) for a in arguments))
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr and len(done.stderr) < 1000
  assert not list(tmp_path.iterdir())
