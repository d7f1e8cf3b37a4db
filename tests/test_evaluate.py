"""Encoders through protocols: controls, folds, spread, and what comes out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from jepax import config as config_lib
from jepax import evaluate as main
from jepax.convert import source as convert
from jepax.convert.weights import Weights, flatten
from jepax.data import scenes
from jepax.data.build import Data
from jepax.evals import collapse, knn, material, scene_protocols, suite
from jepax.evals.protocols import KNN, Attentive, FineTune, Geometry, Grid, Logistic, Views
from jepax.evals.registry import PROTOCOLS
from jepax.evals.scene_protocols import Dense, SceneClasses
from jepax.models.vit import ViT, sincos2d
from jepax.pretrained import Encoder, Preprocess

MODULE = ViT(patch=4, width=16, depth=2, heads=2, mlp_width=16)


@pytest.fixture(scope="module")
def encoder():
  params = jax.jit(MODULE.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
  preprocess = Preprocess(size=(8, 8), mean=(0.5,), std=(0.2,))
  return Encoder(module=MODULE, params=params, preprocess=preprocess, name="target")


@pytest.fixture(scope="module")
def data():
  """Three classes of grey level and place, 90 to learn from and 30 held out."""
  rng = np.random.default_rng(0)
  labels = np.arange(120) % 3
  images = rng.integers(0, 40, (120, 8, 8, 1)).astype(np.uint8)
  for i, label in enumerate(labels):
    images[i, :, 2 * label : 2 * label + 3] += np.uint8(60 + 50 * label)
  labels[:90:10] = (labels[:90:10] + 1) % 3  # some wrong ones, so that no score is 1 by itself
  return Data.from_arrays(images[:90], labels[:90], images[90:], labels[90:])


@pytest.fixture(scope="module")
def tables(encoder, data):
  options = dict(kinds=("pooled", "last4", "tokens"), limit=90, batch_size=32, keep_images=True)
  return material.collect(data.train, [encoder, encoder.random(1)], **options)


def test_collect_is_what_each_encoder_gives(encoder, data, tables):
  """The features of each row are those of its image, the padded last batch included."""
  features = encoder.features(tables.image)
  for kind, wanted in {"pooled": features.pooled, "tokens": features.tokens}.items():
    np.testing.assert_allclose(tables.rows["target"][kind], wanted, atol=1e-6)
  layers = np.asarray(encoder.layers(tables.image, last=2))
  last4 = np.concatenate([layers[0].mean(1), layers[1].mean(1)], 1)  # only two blocks there are
  np.testing.assert_allclose(tables.rows["target"]["last4"], last4, atol=1e-6)
  pixels = tables.rows["pixels"]["pooled"]
  np.testing.assert_allclose(pixels, tables.image.reshape(90, -1) / 255, atol=1e-7)
  order = [np.flatnonzero((data.train.images == image).all((1, 2, 3)))[0] for image in tables.image]
  assert sorted(order) == list(range(90))
  np.testing.assert_array_equal(tables.label, data.train.labels[order])


def test_folds_share_no_row(tables):
  for seed in range(3):
    fold = material.fold(tables, None, num_classes=3, seed=seed)
    rows = np.concatenate([fold.fit, fold.choose, fold.score])
    assert sorted(rows) == list(range(90)), "every row once"
    assert len(fold.score) == 9 and not fold.test
    np.testing.assert_array_equal(np.bincount(tables.label[fold.score], minlength=3).max(), 3)
  tested = material.fold(tables, tables, num_classes=3, seed=0)
  assert tested.test and len(tested.score) == 90 and len(tested.train) == 90


def test_evaluate_puts_controls_beside_every_number(encoder, data):
  protocols = {"knn": KNN(k=5), "knn_euclidean": KNN(k=5, metric="euclidean")}
  encoders = [encoder, encoder.random(1)]
  found = suite.evaluate(encoders, data, protocols, split="test", seeds=2, batch_size=32)
  for name, protocol in protocols.items():
    assert list(found[name]["scores"]) == ["target", "random_init", "pixels"]
    assert found[name]["settings"]["metric"] == protocol.metric and found[name]["source"]
  # What comes out is what the probe gives on the whole training set.
  train, test = (encoder.features(s.images).pooled for s in (data.train, data.test))
  wanted = knn.accuracy(
    train, data.train.labels, test, data.test.labels, num_classes=3, k=5
  )  # fmt: skip
  scores = found["knn"]["scores"]["target"]["accuracy"]
  assert scores["seeds"] == pytest.approx([wanted] * 2) and scores["std"] == 0
  headline = suite.headline(found)
  assert headline["knn"]["target"] == pytest.approx(wanted)
  text = suite.table(found)
  assert f"{100 * wanted:.1f}%" in text and "random_init" in text
  json.dumps(found)


def test_spread_is_over_seeds(encoder, data):
  options = dict(seeds=4, batch_size=32, pixels=False)
  found = suite.evaluate([encoder], data, {"knn": KNN(k=5)}, **options)
  assert list(found["knn"]["scores"]) == ["target"]
  score = found["knn"]["scores"]["target"]["accuracy"]
  values = np.asarray(score["seeds"])
  assert len(set(values)) > 1, "other seeds, other validation splits"
  assert score["mean"] == pytest.approx(values.mean())
  assert score["std"] == pytest.approx(math.sqrt(((values - values.mean()) ** 2).sum() / 3))


def test_protocols_on_features(encoder, data):
  """Each gives fractions and finite numbers, and the label-fed ones beat chance on this data."""
  protocols = {
    "linear": Logistic(share=0.2, C=(0.1,)),
    "sgd": dataclasses.replace(PROTOCOLS["linear_sgd"], norms=("fixed",)),
    "geometry": Geometry(),
    "views": Views(limit=20, views=3),
  }
  found = suite.evaluate([encoder], data, protocols, split="test", batch_size=32)
  with pytest.raises(ValueError, match="mae takes class features"):
    suite.evaluate([encoder], data, {"mae": Grid(recipe="mae", features=("class",))})
  assert list(found["views"]["scores"]) == ["target"], "pixels are not encoded"
  for name in ("linear", "sgd"):
    for subject in ("target", "pixels"):
      score = found[name]["scores"][subject]["accuracy"]["mean"]
      assert 0.45 < score <= 1, (name, subject)
  assert 1 <= found["views"]["scores"]["target"]["lidar"]["mean"] <= 16
  assert found["geometry"]["scores"]["target"]["rankme"]["mean"] >= 1
  json.dumps(found)


def test_protocols_that_train_on_tokens_and_images(encoder, data):
  """The attentive probe sees the encoder's tokens; fine-tuning leaves its weights as they were."""
  before = encoder.sha256()
  protocols = {
    "attentive": Attentive(learning_rates=(0.01,), weight_decays=(0.01,), epochs=40, batch_size=27),
    "finetune": FineTune(epochs=6, batch_size=30, learning_rate=0.03, drop_path=0.0),
  }
  found = suite.evaluate([encoder], data, protocols, split="test", batch_size=32)
  for name in protocols:
    assert list(found[name]["scores"]) == ["target"], "pixels are no encoder"
    assert found[name]["scores"]["target"]["accuracy"]["mean"] > 0.45, name
  assert encoder.sha256() == before


def tell_counts(counting):
  """`scenes.counting`, with a bar below the images whose place says how many shapes there are."""

  def told(n, *, seed):
    found = counting(n, seed=seed)
    image = found.image.copy()
    image[:, 48:] = 0
    for row, count in zip(image, found.count, strict=True):
      row[48:, 8 * (count - 1) : 8 * count] = 255
    return dataclasses.replace(found, image=image)

  return told


def test_scenes(encoder, data, monkeypatch):
  """Answers meet their images through the scene's number, whatever order they are read in."""
  monkeypatch.setattr(scene_protocols, "TRAIN", 96)
  monkeypatch.setattr(scene_protocols, "TEST", 48)
  monkeypatch.setattr(scenes, "counting", tell_counts(scenes.counting))
  scene_protocols.rendered.cache_clear()
  protocols = {
    "counting": SceneClasses(answer="count"),
    "depth": Dense(task="depth", steps=240, learning_rate=0.02, warmup=4),
    "segmentation": Dense(task="segmentation", steps=60, learning_rate=0.02, warmup=4),
  }
  found = suite.evaluate([encoder], data, protocols, batch_size=32)
  scene_protocols.rendered.cache_clear()
  counting = {k: v["accuracy"]["mean"] for k, v in found["counting"]["scores"].items()}
  assert counting["pixels"] > 0.9, "the counts were written on the images"
  assert counting["target"] > 2 / 8
  for subject in ("target", "pixels"):
    assert 0 < found["segmentation"]["scores"][subject]["miou"]["mean"] <= 1
  # The ground lies below, the wall above: an encoder with positions beats a constant easily, if
  # maps and images belong together. A patch of pixels does not know where it is.
  depth = {k: v["mean"] for k, v in found["depth"]["scores"]["target"].items()}
  assert depth["rmse"] < 0.75 * depth["median_rmse"]


def test_every_protocol_says_what_it_is():
  documented = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
  for name, protocol in PROTOCOLS.items():
    assert protocol.source and protocol.kinds is not None, name
    assert type(protocol).__doc__.splitlines()[0].endswith("."), name
    assert f"`{name}`" in documented, name


def test_refusals(encoder, data):
  for encoders, options, message in (
    ([encoder], {"limit": 0}, "must be at least 1, found 1, 0, 256"),
    ([encoder, encoder], {}, "a name of its own; found"),
    ([], {}, "one or more"),
  ):
    with pytest.raises(ValueError, match=message):
      suite.evaluate(encoders, data, {"knn": PROTOCOLS["knn"]}, **options)
  without = Data.from_arrays(data.train.images, data.train.labels)
  with pytest.raises(ValueError, match="no test split"):
    suite.evaluate([encoder], without, {"knn": KNN()}, split="test")
  with pytest.raises(ValueError, match="split='tset' is unknown"):
    suite.evaluate([encoder], data, {"knn": KNN()}, split="tset")
  unlabelled = Data.from_arrays(data.train.images)
  with pytest.raises(ValueError, match="no labels"):
    suite.evaluate([encoder], unlabelled, {"knn": KNN()})


@pytest.fixture
def command():
  """`python -m jepax.evaluate` in this process: arguments -> results, folder.

  Other command lines of jepax define flags of their own, so only those given are parsed.
  """

  def call(*arguments):
    overrides = [a.removeprefix("--") for a in arguments if a.startswith("--data.")]
    rest = (a.removeprefix("--") for a in arguments if not a.startswith("--data."))
    with flagsaver.as_parsed(**dict(a.split("=", 1) for a in rest)):
      flags.FLAGS.mark_as_parsed()
      return main.run(overrides, "a command")

  return call


def test_command_adds_to_its_results_and_refuses_others(encoder, tmp_path, command):
  """Weights from a folder, on the embedded images; a second call adds a protocol."""
  module = MODULE.clone(position="learned", grid=(2, 2))
  params = {**encoder.params, "position": sincos2d((2, 2), 16)}
  weights = Weights(
    module=module,
    branches={"online": flatten(params)},
    preprocess=encoder.preprocess,
    pool="mean",
    origin={"path": "made", "format": "by hand", "sha256": "0"},
  )
  convert.write(weights, tmp_path / "weights")
  given = (f"--weights={tmp_path / 'weights'}", f"--out={tmp_path / 'out'}", "--limit=60")
  results, out = command(*given, "--evals=knn", "--split=test", "--data.eval_split=test")
  assert set(results["protocols"]) == {"knn"}
  assert list(results["knn"]) == ["online", "random_init", "pixels"]
  again, _ = command(*given, "--evals=knn_euclidean", "--split=test", "--data.eval_split=test")
  assert set(again["protocols"]) == {"knn", "knn_euclidean"}
  stored = json.loads((out / "results.json").read_text())
  assert stored["protocols"]["knn"] == results["protocols"]["knn"]
  assert stored["evaluation"]["weights"]["online"]["sha256"] and "Where it looks" in (
    (out / "report.html").read_text()
  )
  with pytest.raises(ValueError, match=r"another evaluation, which differs in \['split'\]"):
    command(*given, "--evals=knn", "--split=validation", "--data.eval_split=test")
  with pytest.raises(ValueError, match=r"--data.eval_splt is unknown; did you mean 'data.eval_sp"):
    command(*given, "--evals=knn", "--data.eval_splt=x")
  with pytest.raises(ValueError, match="linear_mae takes class features"):
    other = f"--out={tmp_path / 'other'}"
    command(given[0], other, "--evals=linear_mae", "--data.train_split=never_read")
  run_folder = tmp_path / "a run"
  run_folder.mkdir()
  (run_folder / "results.json").write_text("{}")
  with pytest.raises(ValueError, match="is of a run, not of an evaluation"):
    command(given[0], f"--out={run_folder}", "--evals=knn")
  with pytest.raises(ValueError, match=r"--evals='knm' is unknown; did you mean 'knn'"):
    command(*given, "--evals=knm")


@pytest.mark.parametrize(
  ("saved", "arguments", "message"),
  [
    ({"given_data": "abc"}, (), "trained on arrays given in Python"),
    ({"stop": {"metric": "knn/target"}}, ("--split=test",), "that split chose the checkpoint"),
    ({"stop": {"metric": "eval/loss"}}, ("--split=test",), "that split chose the checkpoint"),
  ],
)
def test_runs_whose_data_forbid_it(tmp_path, command, saved, arguments, message):
  config = config_lib.base().to_dict() | saved
  (tmp_path / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message):
    command(f"--run={tmp_path}", "--evals=knn", *arguments)


def test_a_table_that_would_not_fit_is_refused_at_once(encoder, data, monkeypatch):
  monkeypatch.setattr(material, "MEMORY", 90 * 100)
  with pytest.raises(ValueError, match=r"90 images at .* lower the limit to"):
    material.collect(data.train, [encoder], kinds=("pooled",), limit=90, batch_size=32)


def test_limit_does_not_cut_what_is_scored(encoder, data):
  protocols = {"geometry": Geometry()}
  options = dict(split="test", batch_size=32, limit=9)
  found = suite.evaluate([encoder], data, protocols, **options)
  rankme = found["geometry"]["scores"]["target"]["rankme"]["mean"]
  wanted = collapse.numbers(encoder.features(data.test.images).pooled)["rankme"]
  assert rankme == pytest.approx(wanted, rel=1e-3)
