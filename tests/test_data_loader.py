"""The loader: order, resume, processes, unreadable examples; the sample for probes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from absl import logging
from PIL import Image

from jepax.data.decode import BadExample
from jepax.data.loader import Loader, balanced_order, batch_indices, take
from jepax.data.sources import ArraySource, FolderSource, scan_folder
from jepax.data.transforms import RandomResizedCrop


class ListSource:
  """Images whose pixels hold their index; those in `bad` can't be read."""

  class_names = None

  def __init__(self, n, *, bad=(), side=8):
    self.labels = np.arange(n, dtype=np.int32) % 3
    self.bad, self.side = set(bad), side

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    if index in self.bad:
      raise BadExample(f"file{index}")
    image = np.arange(self.side**2, dtype=np.uint8).reshape(self.side, self.side, 1)
    return {"image": image + np.uint8(index), "label": int(index)}


def arrays(n=23):
  images = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 1), dtype=np.uint8)
  return ArraySource(images, np.arange(n))


def load(source, transform=None, **options):
  options = {
    "batch_size": 4, "seed": 7, "start": 0, "stop": 12, "threads": 2, "prefetch": 3,
    "max_bad_fraction": 0.0, **options,
  }  # fmt: skip
  with Loader(source, transform, **options) as loader:
    return list(loader)


def assert_equal(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert sorted(x) == sorted(y)
    for key in x:
      np.testing.assert_array_equal(x[key], y[key])


CROP = RandomResizedCrop(size=4, scale=(0.3, 1.0))


@pytest.mark.parametrize("source, transform", [(arrays(), None), (ListSource(23), CROP)])
def test_resume_and_threads_do_not_change_batches(source, transform):
  whole = load(source, transform)
  assert len(whole) == 12
  assert_equal(load(source, transform, start=7), whole[7:])
  assert_equal(load(source, transform, threads=5, prefetch=9), whole)
  assert not np.array_equal(load(source, transform, seed=8)[0]["image"], whole[0]["image"])


@pytest.mark.parametrize("source, transform", [(arrays(), None), (ListSource(23, bad=[2]), CROP)])
def test_two_processes_make_the_batch_of_one(source, transform):
  whole = load(source, transform, max_bad_fraction=1)
  parts = [load(source, transform, max_bad_fraction=1, rows=rows) for rows in ([0, 1], [2, 3])]
  assert parts[0][0]["image"].shape[0] == 2
  joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)]
  assert_equal(joined, whole)


def test_every_epoch_is_another_permutation_of_whole_batches():
  n, b = 23, 4
  steps = [batch_indices(n, batch_size=b, seed=3, step=s) for s in range(10)]
  first, second = np.concatenate(steps[:5]), np.concatenate(steps[5:])
  for epoch, seen in enumerate((first, second)):
    assert len(set(seen.tolist())) == 20  # no repeats; the tail of 3 is dropped
    np.testing.assert_array_equal(seen, np.random.default_rng((3, epoch)).permutation(n)[:20])
  assert not np.array_equal(first, second)
  labels = np.concatenate([batch["label"] for batch in load(arrays(n), seed=3, stop=10)])
  np.testing.assert_array_equal(labels, np.concatenate(steps))


def test_every_step_and_row_has_a_crop_of_its_own():
  image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
  batches = load(ArraySource(image.repeat(4, 0)), CROP, stop=3)
  crops = np.concatenate([batch["image"] for batch in batches]).reshape(12, -1)
  assert len(np.unique(crops, axis=0)) == 12


def test_batches_are_uint8_with_int32_labels_when_known():
  batch = load(arrays(), stop=1)[0]
  assert (batch["image"].dtype, batch["image"].shape) == (np.uint8, (4, 4, 4, 1))
  assert (batch["label"].dtype, batch["label"].shape) == (np.int32, (4,))
  assert list(load(ArraySource(arrays().images), stop=1)[0]) == ["image"]


def test_position_is_the_next_batch_and_an_empty_range_ends_at_once():
  options = {"batch_size": 4, "seed": 0, "threads": 1, "prefetch": 1, "max_bad_fraction": 0}
  with Loader(ListSource(9), None, start=3, stop=5, **options) as loader:
    assert loader.position == 3
    next(loader)
    assert loader.position == 4
    next(loader)
    with pytest.raises(StopIteration):
      next(loader)
    assert loader.position == 5
  assert load(ListSource(9), start=5, stop=5) == []


def test_a_bad_example_is_replaced_by_the_next_of_the_epoch():
  n, bad = 12, {1, 5}
  order = np.random.default_rng((7, 0)).permutation(n)
  expected = []
  for place in range(n):
    while order[place % n] in bad:
      place += 1
    expected.append(order[place % n])
  batches = load(ListSource(n, bad=bad), stop=3, max_bad_fraction=0.2)
  np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), expected)


def test_bad_examples_are_counted_once_and_named_once(monkeypatch):
  named = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: named.append(text % args))
  options = {"batch_size": 4, "seed": 7, "start": 0, "stop": 9, "threads": 2, "prefetch": 2}
  with Loader(ListSource(12, bad={1, 5}), None, max_bad_fraction=0.2, **options) as loader:
    assert loader.bad_examples == 0
    for _ in range(3):  # one epoch meets both
      next(loader)
    assert loader.bad_examples == 2
    list(loader)
    assert loader.bad_examples == 2
  assert sorted(line[-5:] for line in named) == ["file1", "file5"]


def test_too_many_bad_examples_stop_the_run_after_an_epoch():
  source, seen = ListSource(12, bad={1, 5, 7}), []
  options = {"batch_size": 4, "seed": 7, "start": 0, "stop": 9, "threads": 2, "prefetch": 2}
  with (
    Loader(source, None, max_bad_fraction=0.24, **options) as loader,
    pytest.raises(ValueError, match=r"3 of the 12 examples .*\(25.0%.*allows 24.0%"),
  ):
    seen.extend(loader)
  assert len(seen) == 2  # batches 0 and 1 came out; the verdict falls at the epoch's end
  assert len(load(source, stop=9, max_bad_fraction=0.25)) == 9


def test_no_readable_example_is_an_error_not_a_hang():
  with pytest.raises(ValueError, match="12 examples in a row can't be read"):
    load(ListSource(12, bad=range(12)), max_bad_fraction=1)
  with pytest.raises(ValueError, match="none of the 12 examples"):
    take(ListSource(12, bad=range(12)), None, count=2, seed=0)


def test_errors_of_worker_threads_reach_the_caller_unchanged():
  error = ZeroDivisionError("in a thread")

  class Broken(ListSource):
    def __getitem__(self, index):
      raise error

  with pytest.raises(ZeroDivisionError) as caught:
    load(Broken(9))
  assert caught.value is error


def test_images_of_different_sizes_ask_for_a_transform():
  class Ragged(ListSource):
    def __getitem__(self, index):
      return {"image": np.zeros((3 + index, 4, 1), np.uint8)}

  with pytest.raises(ValueError, match="different sizes need a transform"):
    load(Ragged(9))


@pytest.mark.parametrize(
  "options, message",
  [
    ({"batch_size": 24}, "from 1 to the 23 examples of the source, found 24"),
    ({"batch_size": 0}, "found 0"),
    ({"rows": [3, 4]}, r"rows must lie in 0..3, one or more; found \[3, 4\]"),
    ({"rows": []}, "rows must lie"),
    ({"seed": -1}, "seed >= 0"),
    ({"start": 5, "stop": 4}, "start <= stop"),
  ],
)
def test_wrong_sizes(options, message):
  with pytest.raises(ValueError, match=message):
    load(arrays(), **options)


def jpeg(pixels):
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, "JPEG")
  return out.getvalue()


def test_truncated_and_vanished_files_are_skipped(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(8):
    data = jpeg(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8))
    (tmp_path / f"{i}.jpg").write_bytes(data[: len(data) // 2] if i == 3 else data)
  source = scan_folder(tmp_path, channels=3)
  (tmp_path / "6.jpg").unlink()
  assert isinstance(source, FolderSource)
  for index, reason in ((3, "3.jpg: OSError"), (6, "6.jpg: FileNotFoundError")):
    with pytest.raises(BadExample, match=reason):
      source[index]
  crop = RandomResizedCrop(size=8)
  with Loader(
    source, crop, batch_size=4, seed=0, start=0, stop=4, threads=2, prefetch=2, max_bad_fraction=0.5
  ) as loader:
    assert [batch["image"].shape for batch in loader] == [(4, 8, 8, 3)] * 4
    assert loader.bad_examples == 2
  assert take(source, crop, count=8, seed=0)["image"].shape == (6, 8, 8, 3)


def test_take_is_balanced_seeded_and_skips_bad_ones():
  sample = take(ListSource(30), CROP, count=9, seed=1)
  assert np.bincount(sample["label"] % 3).tolist() == [3, 3, 3]
  bad = set(sample["label"][:2].tolist())
  source = ListSource(30, bad=bad)
  sample = take(source, CROP, count=9, seed=1)
  assert len(set(sample["label"].tolist()) - bad) == 9
  assert_equal([take(source, CROP, count=9, seed=1, threads=3)], [sample])
  assert not np.array_equal(take(source, CROP, count=9, seed=2)["label"], sample["label"])
  assert len(take(source, None, count=99, seed=1)["image"]) == 28
  everything = take(arrays(), None, count=99, seed=0)
  assert sorted(everything["label"].tolist()) == list(range(23))
  with pytest.raises(ValueError, match="count"):
    take(source, None, count=0, seed=1)


def test_balanced_order():
  labels = np.array([0] * 50 + [2] * 5 + [7] * 20)
  order = balanced_order(labels, n=75, seed=0)
  assert sorted(order.tolist()) == list(range(75))
  for k in (3, 6, 15):
    assert np.unique(labels[order[:k]], return_counts=True)[1].tolist() == [k // 3] * 3
  for k in (16, 17):  # class 2 is used up
    assert np.ptp([(labels[order[:k]] == c).sum() for c in (0, 7)]) <= 1
  assert sorted(balanced_order(None, n=9, seed=0).tolist()) == list(range(9))
