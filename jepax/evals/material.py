"""What the protocols work on: features of a data set by several encoders, and folds of its rows.

One pass over the images serves all encoders and all kinds of features that are asked for; images
and tokens, which are large, are kept only where a protocol needs them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jepax.data.loader import balanced_order, read, stack
from jepax.data.sources import Source
from jepax.evals import splits
from jepax.evals.batches import in_batches
from jepax.evals.features import pixels
from jepax.models.vit import patchify
from jepax.pretrained import Encoder

MEMORY = 32 * 2**30  # bytes of features and images that a table may hold
PIXELS = "pixels"  # the baseline that every encoder has to beat


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """One set of images as the encoders see them.

  label: i32[n]. rows: subject -> kind of features -> f32[n ...]; the subject `PIXELS` holds the
  pixels in [0, 1]. image: u8[n h w c], or None where no protocol needs them.
  """

  label: np.ndarray
  rows: Mapping[str, Mapping[str, np.ndarray]]
  image: np.ndarray | None


def collect(
  source: Source,
  encoders: Sequence[Encoder],
  *,
  kinds: Sequence[str],
  limit: int,
  batch_size: int,
  keep_images: bool = False,
) -> Table:
  """Features of a labelled source by every encoder, in one pass over it.

  Args:
    source: labelled examples of any size.
    encoders: of one preprocessing, each with a name of its own.
    kinds: see `Encoder.kinds`; those that an encoder doesn't offer are left out.
    limit: images at most; as many of each class as there are, to one, where that is known.
    batch_size: images a forward pass; the last is padded, so that one shape compiles.
    keep_images: whether Table.image is wanted.

  Raises:
    ValueError: no labels, nothing readable, more than MEMORY, or encoders that disagree on the
      preprocessing.
  """
  preprocess = encoders[0].preprocess
  if any(encoder.preprocess != preprocess for encoder in encoders):
    raise ValueError("encoders that are evaluated together need one preprocessing")
  order = balanced_order(source.labels, n=len(source), seed=0)
  examples = read(source, lambda image, rng: preprocess.image(image), order)
  examples = itertools.islice(examples, limit)
  labels, images, rows = [], [], {}
  while chunk := list(itertools.islice(examples, batch_size)):
    batch = stack(chunk)
    if "label" not in batch:
      raise ValueError("these images have no labels; the protocols need them")
    labels.append(batch["label"])
    if keep_images:
      images.append(batch["image"])
    found = list(_features(encoders, batch["image"], kinds, batch_size))
    if not rows:
      size = sum(v.nbytes for _, _, v in found) + keep_images * batch["image"].nbytes
      _check_memory(size // len(chunk), min(limit, len(source)))
    for subject, kind, values in found:
      rows.setdefault(subject, {}).setdefault(kind, []).append(values)
  joined = {s: {k: np.concatenate(v) for k, v in found.items()} for s, found in rows.items()}
  return Table(np.concatenate(labels), joined, np.concatenate(images) if keep_images else None)


def _check_memory(size: int, rows: int) -> None:
  if size * rows > MEMORY:
    raise ValueError(
      f"{rows:,} images at {size:,} bytes of features and pixels each are "
      f"{size * rows / 2**30:.0f} GiB, and {MEMORY // 2**30} are allowed: lower the limit to "
      f"{MEMORY // size:,} images, or leave out the protocols on tokens and images"
    )


def _features(encoders, images, kinds, batch_size):
  """(subject, kind, f32[n ...]) of one batch."""
  for encoder in encoders:
    names = tuple(kind for kind in kinds if kind in encoder.offered)
    for kind, values in _encode(encoder, images, names, batch_size).items():
      yield encoder.name, kind, values
  for kind in kinds:
    if not any(kind in encoder.offered for encoder in encoders):
      continue
    if kind == "tokens":
      patch = encoders[0].module.patch
      yield PIXELS, kind, np.asarray(patchify(images.astype(np.float32) / 255, patch=patch))
    else:
      yield PIXELS, kind, pixels(images)


def _encode(encoder, images, kinds, batch_size) -> dict[str, np.ndarray]:
  """Kinds of features of images of the encoder's size."""
  found = in_batches(lambda x: encoder.kinds(x, kinds), images, batch_size=batch_size)
  return {kind: values.astype(np.float32) for kind, values in found.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
  """Which rows a protocol fits on, chooses its settings on, and is scored on; i64 indices.

  `fit` and `choose` are rows of the training table; `score` of it too, or of the test table.
  """

  fit: np.ndarray
  choose: np.ndarray
  score: np.ndarray
  test: bool

  @property
  def train(self) -> np.ndarray:
    """All that may be learned from: `fit` and `choose`."""
    return np.concatenate([self.fit, self.choose])


def fold(
  train: Table,
  test: Table | None = None,
  *,
  num_classes: int | None,
  seed: int,
  held: float = 0.1,
  chosen: float = 0.1,
) -> Fold:
  """Splits the training rows, each class in proportion; with `test` all of that is scored.

  Args:
    train: labelled rows.
    test: scored instead of a validation split.
    num_classes: of the labels; None where they are not classes: rows are then drawn at random.
    seed: of the splits.
    held: share of the training rows scored, without `test`.
    chosen: share of what then remains that settings are chosen on.
  """
  labels = train.label
  if num_classes is None:
    labels, num_classes = np.arange(len(labels)) % 2, 2  # two classes that mean nothing
  split = functools.partial(splits.validation, num_classes=num_classes)
  rest = np.arange(len(labels))
  if test is not None:
    score = np.arange(len(test.label))
  else:
    rest, score = split(labels, share=held, seed=seed)
  # Another seed: with the same one `choose` would follow `score` in the same shuffle.
  fit, choose = split(labels[rest], share=chosen, seed=seed + 1)
  return Fold(fit=rest[fit], choose=rest[choose], score=score, test=test is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
  """One subject's features in one fold: what a protocol gets.

  encoder: the subject, None for the pixels. grid: patches (rows, columns) of 'tokens'.
  num_classes: of the labels. batch_size: images a forward pass.
  """

  subject: str
  encoder: Encoder | None
  tables: Mapping[bool, Table]  # False: training, True: test
  fold: Fold
  grid: tuple[int, int]
  num_classes: int
  batch_size: int

  def x(self, part: str, kind: str = "pooled") -> np.ndarray:
    """Features f32[n ...] of the rows 'fit', 'choose', 'train' (both) or 'score'."""
    return self._table(part).rows[self.subject][kind][getattr(self.fold, part)]

  def y(self, part: str) -> np.ndarray:
    """Their labels i32[n]."""
    return self._table(part).label[getattr(self.fold, part)]

  def images(self, part: str) -> np.ndarray:
    """Their images u8[n h w c]."""
    return self._table(part).image[getattr(self.fold, part)]

  def encode(self, images: np.ndarray, *, kind: str) -> np.ndarray:
    """Features f32[n ...] of other images of the encoder's size, u8[n h w c]."""
    return _encode(self.encoder, images, (kind,), self.batch_size)[kind]

  def has(self, kind: str) -> bool:
    """Whether the subject has this kind of features."""
    return kind in self.tables[False].rows[self.subject]

  def _table(self, part: str) -> Table:
    return self.tables[part == "score" and self.fold.test]
