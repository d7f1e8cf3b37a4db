"""The probes that run beside training: k-NN, linear, and collapse numbers, on held-out images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from jepax.core import Features
from jepax.evals import collapse, knn, linear
from jepax.evals.features import extract

SCORES = ("knn", "linear")
NEIGHBOURS = 20  # that vote; all there are in a smaller bank

Encode = Callable[[jax.Array], Features]


@dataclasses.dataclass(frozen=True)
class Probe:
  """Frozen features of a bank (training images) and of queries (held-out images), scored.

  bank, queries: dicts of image u8[n h w c] and, where the data has labels, label i32[n].
  num_classes: None without labels; then only the collapse numbers remain.
  batch_size: images a forward pass.
  """

  bank: Mapping[str, np.ndarray]
  queries: Mapping[str, np.ndarray]
  num_classes: int | None
  batch_size: int

  def metrics(self, branches: Iterable[str]) -> list[str]:
    """Names of what the probe measures, as `flatten` gives them."""
    names = [*(SCORES if self.num_classes else ()), *collapse.NUMBERS]
    return list(flatten({branch: dict.fromkeys(names, 0.0) for branch in branches}))

  def features(self, encode: Encode) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features f32[n d] of the bank and of the queries."""
    sets = (self.bank["image"], self.queries["image"])
    bank, queries = (extract(encode, images, batch_size=self.batch_size) for images in sets)
    return bank, queries

  def scores(self, bank: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """Accuracies of the two probes, fractions of 1; nothing without labels.

    Args:
      bank: f32[n d], features that the probes fit on.
      queries: f32[m d], features they are scored on.
    """
    if self.num_classes is None:
      return {}
    train, test = self.bank["label"], self.queries["label"]
    classes = self.num_classes
    k = min(NEIGHBOURS, len(bank))
    return {
      "knn": knn.accuracy(bank, train, queries, test, num_classes=classes, k=k),
      "linear": linear.accuracy(bank, train, queries, test, num_classes=classes),
    }

  def __call__(self, branches: Mapping[str, Encode]) -> dict[str, dict[str, float]]:
    """Of each encoder: scores, collapse numbers and 'dim', the features' width."""
    out = {}
    for branch, encode in branches.items():
      bank, queries = self.features(encode)
      numbers = collapse.numbers(queries)
      out[branch] = {**self.scores(bank, queries), **numbers, "dim": queries.shape[1]}
    return out


def flatten(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """{'target': {'knn': ..}} -> {'knn/target': .., 'collapse/target_rankme': ..}."""
  row = {}
  for branch, numbers in found.items():
    for name, value in numbers.items():
      if name in SCORES:
        row[f"{name}/{branch}"] = value
      elif name in (*collapse.NUMBERS, "ema_distance"):
        row[f"collapse/{branch}_{name}"] = value
  return row
