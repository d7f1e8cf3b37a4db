"""Packing images into shards, and reading them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jepax.data import origins, packing, shards
from jepax.data.build import build, defaults
from jepax.data.decode import BadExample
from jepax.data.loader import Loader
from jepax.data.shards import open_shards
from jepax.data.sources import scan_folder
from jepax.data.transforms import DECODERS, FAST, RandomResizedCrop

ROOT = Path(__file__).parent.parent


def jpeg(seed, size=(20, 30)):
  out = io.BytesIO()
  pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(out, "JPEG")
  return out.getvalue()


def fill(folder, classes=("ant", "bee"), count=6):
  for k, name in enumerate(classes):
    (folder / name).mkdir(parents=True)
    for i in range(count):
      (folder / name / f"{i}.jpg").write_bytes(jpeg(100 * k + i, (20 + i, 30)))
  return folder


def pack(folder, out, **options):
  return packing.pack(origins.Folder.scan(folder), out, **{"shard_bytes": 4000, **options})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  return fill(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def packed(images, tmp_path_factory):
  out = tmp_path_factory.mktemp("packed") / "out"
  pack(images, out)
  return out


def test_packed_examples_are_those_of_the_folder(images, packed):
  folder, source = scan_folder(images, channels=3), open_shards(packed, channels=3)
  index = shards.verify(packed)
  assert len(index.shards) > 2 and sum(shard.records for shard in index.shards) == 12
  assert len(source) == 12 and source.class_names == ("ant", "bee")
  np.testing.assert_array_equal(source.labels, folder.labels)
  for i in (11, 0, 5, 6):  # in any order
    assert source.encoded(i)["image"].file == (images / folder.files[i]).read_bytes()
    assert folder.files[i] in source.encoded(i)["image"].name
    np.testing.assert_array_equal(source[i]["image"], folder[i]["image"])
    assert source[i]["label"] == folder[i]["label"]
  assert open_shards(packed, channels=1)[3]["image"].shape == (23, 30, 1)
  content = json.loads((packed / "index.json").read_text())
  assert content["count"] == 12 and content["version"] == 1 and content["unreadable"] == []


def test_a_folder_without_classes_has_no_labels(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.jpg").write_bytes(jpeg(0))
  pack(tmp_path / "in", tmp_path / "out")
  source = open_shards(tmp_path / "out", channels=3)
  assert source.labels is None and source.class_names is None and list(source[0]) == ["image"]


def test_unreadable_images_are_named_and_counted(tmp_path):
  folder = fill(tmp_path / "in")
  (folder / "ant" / "cut.jpg").write_bytes(jpeg(7)[:-500])
  (folder / "bee" / "text.png").write_text("no image")
  with pytest.raises(ValueError, match=r"2 of 14 images are unreadable \(14.3%.*cut.jpg: OSError"):
    pack(folder, tmp_path / "out", max_bad_fraction=0.1)
  assert not shards.is_packed(tmp_path / "out")
  index = pack(folder, tmp_path / "out", max_bad_fraction=0.2)
  assert index == shards.Index.read(tmp_path / "out")
  assert [name for name, _ in index.unreadable] == ["ant/cut.jpg", "bee/text.png"]
  assert index.unreadable[0][1].startswith("OSError") and index.count == 12
  assert np.bincount(open_shards(tmp_path / "out", channels=3).labels).tolist() == [6, 6]


def test_empty_files_are_unreadable_wherever_they_stand(tmp_path):
  folder = fill(tmp_path / "in", ("bee",))
  (folder / "ant").mkdir()
  for name in ("ant/0.jpg", "ant/1.jpg", "bee/9.jpg"):
    (folder / name).touch()
  index = pack(folder, tmp_path / "out", max_bad_fraction=0.5)
  assert index.count == 6
  assert [name for name, _ in index.unreadable] == ["ant/0.jpg", "ant/1.jpg", "bee/9.jpg"]
  for file in (folder / "bee").iterdir():
    file.write_bytes(b"")
  with pytest.raises(ValueError, match="9 of 9 images are unreadable"):
    pack(folder, tmp_path / "none", max_bad_fraction=0.5)


def test_kill_at_any_moment(tmp_path):
  images = fill(tmp_path / "images", count=2)
  command = [sys.executable, str(ROOT / "tests" / "kill_packing.py"), str(images), str(tmp_path)]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  *killed, whole = json.loads(done.stdout)
  assert not whole["died"] and all(row["died"] for row in killed)
  assert len(whole["after"]) == 2
  assert len(killed) >= 4 + 2 * 6  # each image, and the steps by which a shard comes to count
  assert [row["packed"] for row in killed[:-2]] == [False] * (len(killed) - 2)
  for row in [*killed, whole]:
    assert row["index"] == whole["index"] and row["after"].keys() == whole["after"].keys()
    assert row["left"] == [*sorted(["index.json", "labels.npy", *whole["after"]])]
    for name in row["finished"]:  # kept, not written again
      assert row["after"][name] == row["before"][name]
  assert {len(row["finished"]) for row in killed} == set(range(len(whole["after"]) + 1))


def test_what_is_finished_is_verified_and_repaired(images, packed, tmp_path, monkeypatch):
  class Stop(Exception):
    pass

  def stop(*args, **kwargs):
    raise Stop

  with monkeypatch.context() as patch:
    patch.setattr(packing, "_write_index", stop)
    with pytest.raises(Stop):
      pack(images, tmp_path)
  flip(tmp_path / "shard-00001.array_record")
  pack(images, tmp_path)
  assert (tmp_path / "index.json").read_text() == (packed / "index.json").read_text()
  shards.verify(tmp_path)


def flip(path, *, inside=b""):
  """Changes one bit, of these bytes where given."""
  content = bytearray(path.read_bytes())
  content[content.index(inside) + len(inside) // 2] ^= 1
  path.write_bytes(content)


def test_damage_is_found(images, packed, tmp_path):
  damaged = Path(shutil.copytree(packed, tmp_path / "damaged"))
  shard = damaged / "shard-00000.array_record"
  flip(shard, inside=jpeg(0))  # the first image's
  source = open_shards(damaged, channels=3)
  with pytest.raises(BadExample, match=r"damaged\[0\]: .*hash mismatch"):
    source[0]
  assert source[len(source) - 1]["label"] == 1
  for check in (lambda: shards.verify(damaged), lambda: pack(images, damaged)):
    with pytest.raises(ValueError, match=r"shard-00000.array_record has the sha256"):
      check()
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(ValueError, match=r"has .* bytes, the index says .*; copy the folder anew"):
    open_shards(damaged, channels=3)
  shard.unlink()
  with pytest.raises(ValueError, match=r"shard-00000.array_record can't be read: No such file"):
    open_shards(damaged, channels=3)
  for strange in ("[]", '{"shards": []}'):
    (damaged / "index.json").write_text(strange)
    with pytest.raises(ValueError, match=r"index.json is not of `python -m jepax.data.pack`"):
      open_shards(damaged, channels=3)


def test_another_source_is_refused(images, packed, tmp_path):
  before = (packed / "index.json").stat().st_mtime_ns
  assert pack(images, packed) == shards.Index.read(packed)
  assert (packed / "index.json").stat().st_mtime_ns == before
  other = fill(tmp_path / "other", ("cat",))
  with pytest.raises(ValueError, match="holds another set, or the source has changed"):
    pack(other, packed)
  (other / "cat" / "text.png").write_text("no image")
  with pytest.raises(ValueError, match="unreadable"):  # stops before the index
    pack(other, tmp_path / "begun", max_bad_fraction=0.0)
  os.utime(other / "cat" / "0.jpg")
  with pytest.raises(ValueError, match="the source has changed"):
    pack(other, tmp_path / "begun")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").write_text("")
  with pytest.raises(ValueError, match=r"no packed set and not empty: \['thesis.tex'\]"):
    pack(other, tmp_path / "full")
  with (
    packing._claimed(tmp_path / "busy"),
    pytest.raises(ValueError, match="another process packs into"),
  ):
    pack(other, tmp_path / "busy")


def test_splits_are_packed_one_by_one(tmp_path):
  fill(tmp_path / "train")
  fill(tmp_path / "val", ("bee",), 2)
  with pytest.raises(ValueError, match=r"holds the splits \['train', 'val'\].*OUT/train; python"):
    origins.Folder.scan(tmp_path)


def config(path, **changes):
  c = defaults()
  c.update(source="shards", path=str(path), size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
  c.update(changes)
  return c


def test_build_reads_splits_and_renumbers_their_classes(tmp_path):
  pack(fill(tmp_path / "train", ("ant", "bee", "cat")), tmp_path / "out" / "train")
  pack(fill(tmp_path / "val", ("bee", "cat"), 2), tmp_path / "out" / "val")
  data = build(config(tmp_path / "out"))
  assert (len(data.train), len(data.test), data.num_classes) == (18, 4, 3)
  assert data.test.labels.tolist() == [1, 1, 2, 2] and data.test[0]["label"] == 1
  assert data.test.class_names == ("ant", "bee", "cat") and data.name == str(tmp_path / "out")
  assert build(config(tmp_path / "out", eval_split="")).test is None
  with pytest.raises(ValueError, match=r"classes the training split lacks: \['ant'\]"):
    build(config(tmp_path / "out", train_split="val", eval_split="train"))
  with pytest.raises(ValueError, match=r"out/training' holds no index.json; make it with `python"):
    build(config(tmp_path / "out", train_split="training"))
  with pytest.raises(ValueError, match=r"needs data.path"):
    build(config(""))


def test_build_holds_out_a_share_of_a_single_set(packed):
  data = build(config(packed, eval_fraction=0.3))
  assert np.bincount(data.test.labels).tolist() == [2, 2] and len(data.train) == 8
  names = [data.train.encoded(i)["image"].name for i in range(8)]
  assert not set(names) & {data.test.encoded(i)["image"].name for i in range(4)}
  assert build(config(packed, eval_split="")).test is None


@pytest.mark.parametrize("decoder", DECODERS)
def test_batches_do_not_depend_on_processes_threads_or_the_start(packed, decoder):
  if decoder in FAST:
    try:
      FAST[decoder].require()
    except ValueError as error:
      pytest.skip(str(error))
  source, crop = open_shards(packed, channels=3), RandomResizedCrop(8, decoder=decoder)

  def load(**options):
    options = {"batch_size": 4, "seed": 1, "start": 0, "stop": 7, "threads": 1, **options}
    with Loader(source, crop, prefetch=2, max_bad_fraction=0.0, **options) as loader:
      return [(batch["image"], batch["label"]) for batch in loader]

  whole = load()
  two = [load(rows=rows, threads=3) for rows in ([0, 1], [2, 3])]  # of two processes
  resumed = load(start=3, rows=[2])  # on the third of four
  for step, batch in enumerate(whole):
    for part in range(2):
      np.testing.assert_array_equal(
        np.concatenate([two[0][step][part], two[1][step][part]]), batch[part]
      )
      if step >= 3:
        np.testing.assert_array_equal(resumed[step - 3][part], batch[part][2:3])


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  """Two prepared sets: one of encoded images, one of raw pixels."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.core import registered

  folder = tmp_path_factory.mktemp("tfds")

  def prepare(set_name, feature, image):
    class Tiny(tfds.core.GeneratorBasedBuilder):
      name, VERSION = set_name, tfds.core.Version("1.0.0")

      def _info(self):
        features = {"image": feature, "label": tfds.features.ClassLabel(names=["low", "high"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

      def _generate_examples(self):
        for i in range(5):
          yield i, {"image": image(i), "label": int(i >= 3)}

    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()

  with registered.skip_registration():
    encoded = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
    prepare("encoded", encoded, lambda i: io.BytesIO(jpeg(i)))
    raw = tfds.features.Tensor(shape=(6, 6, 1), dtype=np.uint8)
    prepare("raw", raw, lambda i: np.full((6, 6, 1), 10 * i, np.uint8))
  return str(folder)


def test_tfds_images_keep_their_bytes_and_pixels_become_png(tfds_dir, tmp_path):
  for name in ("encoded", "raw"):
    origin = origins.Tfds.open(name, split="train", data_dir=tfds_dir, label="label")
    packing.pack(origin, tmp_path / name, shard_bytes=1500)
    assert origin.identity["name"] == f"{name}/1.0.0"
  source = open_shards(tmp_path / "encoded", channels=3)
  found = {source.encoded(i)["image"].file: source[i]["label"] for i in range(5)}
  assert found == {jpeg(i): int(i >= 3) for i in range(5)}
  assert source.class_names == ("low", "high")
  source = open_shards(tmp_path / "raw", channels=1)
  found = {(int(source[i]["image"].max()), int(source[i]["label"])) for i in range(5)}
  assert found == {(10 * i, int(i >= 3)) for i in range(5)}
  assert (source[0]["image"] == source[0]["image"][0, 0]).all()
  half = origins.Tfds.open("raw", split="train[:40%]", data_dir=tfds_dir, label="label")
  with pytest.raises(ValueError, match="holds another set"):
    packing.pack(half, tmp_path / "raw")


def command(*arguments) -> subprocess.CompletedProcess:
  """In a process of its own: other programs of jepax define flags of the same names."""
  line = [sys.executable, "-m", "jepax.data.pack", *map(str, arguments)]
  return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_the_command_line(images, tfds_dir, tmp_path):
  out = tmp_path / "out"
  printed = command(images, out).stdout
  assert "shard 1/1  0 unreadable" in printed and "packed 12 images, 2 classes, 1 sh" in printed
  printed = command("tfds:raw", tmp_path / "raw", f"--data_dir={tfds_dir}").stdout
  assert "packed 5 images, 2 classes" in printed
  assert "out: verified 12 images" in command("--verify", out).stdout
  flip(out / "shard-00000.array_record")
  for arguments, message in (
    (("--verify", out), "sha256"),
    ((out,), "expected SOURCE and OUT"),
    (("tfds:rew", out, f"--data_dir={tfds_dir}"), "no TFDS set 'rew'"),
  ):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
