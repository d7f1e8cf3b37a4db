"""Protocols on rendered scenes: what features keep of number, distance, place and shape.

The labels of a scene table are the scenes' numbers, so that a protocol looks its answers up.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from jepax.data import scenes
from jepax.evals import depth, linear, segmentation
from jepax.evals.material import Material
from jepax.evals.protocols import OnFeatures, Protocol

TRAIN, TEST = 2000, 500
SEEDS = {"train": 0, "score": 1}  # of the scenes; no scene is in both


@functools.cache
def rendered(name: str, part: str) -> scenes.Scenes:
  """The scenes 'counting' or 'spheres' to fit on ('train') or to score ('score')."""
  draw = {"counting": scenes.counting, "spheres": scenes.spheres}[name]
  return draw(TRAIN if part == "train" else TEST, seed=SEEDS[part])


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneClasses(OnFeatures):
  """A linear probe on one vector a scene: how many things, or how far the nearest.

  answer: 'count' of shapes (8 classes) or 'nearest' of spheres (6 classes).
  """

  answer: str
  C: float = 1.0

  source: ClassVar[str] = "after VTAB's Clevr/count and Clevr/dist, arXiv 1910.04867"

  @property
  def scene(self) -> str:
    return {"count": "counting", "nearest": "spheres"}[self.answer]

  def __call__(self, material: Material, *, seed: int) -> dict[str, float]:
    del seed
    answers = {part: self._answers(material, part) for part in ("train", "score")}
    found = linear.accuracy(
      material.x("train", self.features),
      answers["train"],
      material.x("score", self.features),
      answers["score"],
      num_classes=8 if self.answer == "count" else 6,
      C=self.C,
    )
    return {"accuracy": found}

  def _answers(self, material: Material, part: str) -> np.ndarray:
    found = getattr(rendered(self.scene, part), self.answer)[material.y(part)]
    return found - (self.answer == "count")  # counts start at 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Protocol):
  """A linear head on frozen patch tokens: 'depth' or 'segmentation' of spheres in a room."""

  task: str
  steps: int = 1000
  learning_rate: float = 1e-2
  warmup: int = 50
  batch_size: int = 16

  kinds: ClassVar[tuple[str, ...]] = ("tokens",)
  scene: ClassVar[str] = "spheres"

  @property
  def source(self) -> str:
    return f"DINOv2's linear {self.task} head, arXiv 2304.07193"

  def __call__(self, material: Material, *, seed: int) -> dict[str, float]:
    field = {"depth": "depth", "segmentation": "segment"}[self.task]
    tokens = {part: material.x(part, "tokens") for part in ("train", "score")}
    maps = {part: getattr(rendered(self.scene, part), field)[material.y(part)] for part in tokens}
    options = dict(
      grid=material.grid,
      steps=self.steps,
      learning_rate=self.learning_rate,
      warmup=self.warmup,
      batch_size=self.batch_size,
      seed=seed,
    )
    if self.task == "depth":
      head = depth.fit(tokens["train"], maps["train"], **options)
      return depth.score(head, tokens["score"], maps["score"])
    head = segmentation.fit(tokens["train"], maps["train"], num_classes=3, **options)
    return segmentation.score(head, tokens["score"], maps["score"])
