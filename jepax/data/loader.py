"""Batches as a pure function of (seed, step).

Examples come from an endless stream of permutations, one an epoch; global batch `step` is the
positions [step*B, (step+1)*B) of that stream, of which each process loads its own rows. Crops are
drawn by a generator keyed by (seed, step, row). So a batch does not depend on how many processes
or threads load it, or on where a run was resumed: the whole state of the input is one number.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from jepax.data.decode import BadExample
from jepax.data.sources import ArraySource, EncodedSource, Example, Source
from jepax.data.transforms import Transform, decodes

# Shares of unreadable examples are judged, and searches for a readable one given up, at this many.
_ENOUGH_READS = 1000
_CROP = 1  # last word of a crop's key; permutations have none, so no crop shares their stream


def batch_indices(n: int, *, batch_size: int, seed: int, step: int) -> np.ndarray:
  """The examples of one global batch.

  Args:
    n: examples in the source.
    batch_size: rows of the global batch, at most n.
    seed: at least 0.
    step: number of the batch, from 0. An epoch has n // batch_size batches; its tail is dropped.

  Returns:
    i64[batch_size], each in [0, n), no two alike.
  """
  epoch, place = divmod(step, _batches_per_epoch(n, batch_size))
  return _epoch_order(n, seed, epoch)[place * batch_size : (place + 1) * batch_size]


def _batches_per_epoch(n: int, batch_size: int) -> int:
  if not 1 <= batch_size <= n:
    raise ValueError(
      f"batch_size must be from 1 to the {n} examples of the source, found {batch_size}"
    )
  return n // batch_size


@functools.lru_cache(maxsize=2)  # threads may be loading the end of one epoch and the next's start
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
  order = np.random.default_rng((seed, epoch)).permutation(n)
  order.setflags(write=False)
  return order


@dataclasses.dataclass(frozen=True)
class _Loaded:
  batch: dict[str, np.ndarray]
  bad: tuple[tuple[int, str], ...] = ()  # (index, why) of the unreadable examples drawn


@dataclasses.dataclass(frozen=True)
class _BatchReader:
  """Global step -> this process's part of the batch; pure, so any thread may run it."""

  source: Source
  transform: Transform | None
  batch_size: int
  seed: int
  rows: np.ndarray  # of the global batch, that this process loads

  @property
  def vectorised(self) -> bool:
    return isinstance(self.source, ArraySource) and self.transform is None

  def __call__(self, step: int) -> _Loaded:
    if self.vectorised:
      index = batch_indices(len(self.source), batch_size=self.batch_size, seed=self.seed, step=step)
      return _Loaded(self.source.rows(index[self.rows]))
    examples, bad = [], []
    for row in self.rows.tolist():
      examples.append(self._read(step, row, bad))
    return _Loaded(stack(examples), tuple(bad))

  def _read(self, step: int, row: int, bad: list[tuple[int, str]]) -> Example:
    """Reads a row's example or, if it is bad, the next readable one in the epoch's order."""
    n = len(self.source)
    epoch, place = divmod(step, n // self.batch_size)
    order, first = _epoch_order(n, self.seed, epoch), place * self.batch_size + row
    tries = min(n, _ENOUGH_READS)
    for offset in range(tries):
      index = int(order[(first + offset) % n])
      try:
        return _fetch(self.source, self.transform, index, (self.seed, step, row, _CROP))
      except BadExample as error:
        reason = str(error)
      if offset == 0:  # a replacement that is bad is counted in its own turn
        bad.append((index, reason))
    raise ValueError(f"{tries} examples in a row can't be read (of {n}); the last: {reason}")


def _fetch(
  source: Source, transform: Transform | None, index: int, key: tuple[int, ...]
) -> Example:
  """Reads and transforms one example, with randomness from `key`; raises BadExample."""
  if transform is None:
    return source[index]
  encoded = decodes(transform) and isinstance(source, EncodedSource)
  example = source.encoded(index) if encoded else source[index]
  return {**example, "image": transform(example["image"], np.random.default_rng(key))}


class Loader:
  """Iterates over the batches [start, stop) of one process, loading ahead in threads.

  Yields dicts of numpy arrays: image u8[b h w c] and, from labelled sources, label i32[b], b the
  number of rows it loads. A context manager, or call close().

  position: the next global batch.
  bad_examples: different unreadable examples met so far, counted as their batches are handed
    out. Each is replaced by the next readable one of the epoch and named in the log once.
  """

  def __init__(
    self,
    source: Source,
    transform: Transform | None,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    rows: Sequence[int] | np.ndarray | None = None,
    threads: int,
    prefetch: int,
    max_bad_fraction: float,
  ):
    """Starts loading at the first `next`.

    Args:
      source: the examples.
      transform: makes images of one size, or None where they have it.
      batch_size: rows of the global batch.
      seed: at least 0; picks the order and the crops.
      start: first global batch.
      stop: one past the last global batch.
      rows: which of the global batch to load, all by default.
      threads: batches decoded at the same time.
      prefetch: batches held ready, at least `threads` to keep them busy.
      max_bad_fraction: share of unreadable examples, 0 to 1, above which the run stops. Judged
        once 1,000 examples or one epoch are read.

    Raises:
      ValueError: sizes that do not divide or fit; from iterating: too many unreadable examples.
    """
    _batches_per_epoch(len(source), batch_size)
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    if rows.size == 0 or rows.min() < 0 or rows.max() >= batch_size:
      raise ValueError(f"rows must lie in 0..{batch_size - 1}, one or more; found {rows.tolist()}")
    if seed < 0 or not 0 <= start <= stop:
      raise ValueError(f"need seed >= 0 and 0 <= start <= stop, found {seed=}, {start=}, {stop=}")
    self.position = start
    self._reader = _BatchReader(source, transform, batch_size, seed, rows)
    self._max_bad_fraction = max_bad_fraction
    self._bad_indices: set[int] = set()
    self._reads = self._bad_reads = 0
    batches = grain.MapDataset.range(start, stop).map(self._reader)
    # A batch of an array in memory is one copy: threads would only cost.
    if self._reader.vectorised:
      threads = prefetch = 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    self._iterator = iter(batches.to_iter_dataset(options))

  @property
  def bad_examples(self) -> int:
    return len(self._bad_indices)

  def __iter__(self) -> Loader:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    loaded = next(self._iterator)
    self.position += 1
    self._reads += len(self._reader.rows)
    self._bad_reads += len(loaded.bad)
    for index, reason in loaded.bad:
      if index not in self._bad_indices:
        logging.warning("Unreadable example, replaced by another: %s", reason)
        self._bad_indices.add(index)
    self._check_bad_share()
    return loaded.batch

  def _check_bad_share(self) -> None:
    reader = self._reader
    epoch = len(reader.source) // reader.batch_size * len(reader.rows)
    share = self._bad_reads / self._reads
    if self._reads >= min(_ENOUGH_READS, epoch) and share > self._max_bad_fraction:
      raise ValueError(
        f"{self._bad_reads} of the {self._reads} examples read so far are unreadable ({share:.1%}; "
        f"data.max_bad_fraction allows {self._max_bad_fraction:.1%}). The log names them; repair "
        "or remove them, or raise data.max_bad_fraction."
      )

  def close(self) -> None:
    """Stops the threads."""
    self._iterator.close()

  def __enter__(self) -> Loader:
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def take(
  source: Source,
  transform: Transform | None,
  *,
  count: int,
  seed: int,
  threads: int = 16,
) -> dict[str, np.ndarray]:
  """A fixed sample as arrays, for probes; the same for the same seed.

  Args:
    source: the examples.
    transform: makes images of one size, or None where they have it.
    count: examples wanted; all of them when the source has no more.
    seed: at least 0.
    threads: examples decoded at the same time.

  Returns:
    image u8[n h w c] and, from labelled sources, label i32[n]; n is below count only when the
    source has fewer readable examples. As many of each class as there are, to one, where
    source.labels is known.

  Raises:
    ValueError: count below 1, or no readable example.
  """
  if count < 1:
    raise ValueError(f"count must be at least 1, found {count}")
  order = balanced_order(source.labels, n=len(source), seed=seed)
  if isinstance(source, ArraySource) and transform is None:
    return source.rows(order[:count])
  stream = read(source, transform, order, seed=seed, threads=threads)
  return stack(list(itertools.islice(stream, count)))


def read(
  source: Source,
  transform: Transform | None,
  order: np.ndarray,
  *,
  seed: int = 0,
  threads: int = 16,
) -> Iterator[Example]:
  """Examples one by one, decoded ahead by threads; those that can't be read are logged, left out.

  Args:
    source: the examples.
    transform: of each image, or None.
    order: i64[n], which to read.
    seed: of the transform's randomness.
    threads: examples decoded at the same time.

  Raises:
    ValueError: at the end, where no example could be read.
  """
  fetch = functools.partial(_read_for_probe, source, transform, seed)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
  iterator = iter(grain.MapDataset.source(order).map(fetch).to_iter_dataset(options))
  found = 0
  try:
    for example in iterator:
      if isinstance(example, BadExample):
        logging.warning("Unreadable example, left out: %s", example)
        continue
      found += 1
      yield example
  finally:
    iterator.close()
  if not found:
    raise ValueError(f"none of the {len(source)} examples can be read; the log says why")


def _read_for_probe(
  source: Source, transform: Transform | None, seed: int, index: np.integer
) -> Example | BadExample:
  try:
    return _fetch(source, transform, int(index), (seed, int(index), 0, _CROP))
  except BadExample as error:
    return error


def balanced_order(labels: np.ndarray | None, *, n: int, seed: int) -> np.ndarray:
  """A random order whose every beginning has as many of each class, to one, while they last.

  Args:
    labels: i32[n], or None for a plain permutation.
    n: examples.
    seed: at least 0.

  Returns:
    i64[n], a permutation.
  """
  order = np.random.default_rng(seed).permutation(n)
  if labels is None:
    return order
  by_class = np.argsort(labels[order], kind="stable")
  _, counts = np.unique(labels, return_counts=True)
  turn = np.empty(n, np.int64)  # how many of its class come before it
  turn[by_class] = np.arange(n) - np.repeat(counts.cumsum() - counts, counts)
  return order[np.argsort(turn, kind="stable")]


def stack(examples: list[Example]) -> dict[str, np.ndarray]:
  """Examples of one shape as arrays: image u8[n h w c] and, where all have one, label i32[n]."""
  shapes = {example["image"].shape for example in examples}
  if len(shapes) > 1:
    raise ValueError(f"images of different sizes need a transform; found {sorted(shapes)[:4]}")
  batch = {"image": np.stack([example["image"] for example in examples])}
  if "label" in examples[0]:
    batch["label"] = np.array([example["label"] for example in examples], np.int32)
  return batch
