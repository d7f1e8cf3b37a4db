"""Protocols on frozen features: each a frozen dataclass of its settings, which go into the results.

A protocol is a function (material, seed) -> {number: value} with what `Protocol` says of its needs.
They are listed by name in `registry.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import jax
import numpy as np

from jepax.data.augment import Augment
from jepax.evals import attentive, collapse, finetune, geometry, grid, knn, lars, linear, splits
from jepax.evals.material import Material


class Protocol:
  """What a protocol needs; what most don't is off here.

  kinds: of features, see `jepax.pretrained.KINDS`. images: whether it reads them. blocks: whether
  it takes a ViT apart. scene: the rendered scenes it asks about, instead of the caller's images.
  """

  kinds: ClassVar[tuple[str, ...]] = ()
  images: ClassVar[bool] = False
  blocks: ClassVar[bool] = False
  scene: ClassVar[str | None] = None

  def fits(self, material: Material) -> bool:
    """Whether it can score this subject; the pixels are one without an encoder."""
    if self.blocks or not self.kinds:
      return material.encoder is not None
    return any(material.has(kind) for kind in self.kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnFeatures(Protocol):
  """What protocols on one vector an image share: the kind of features they take."""

  features: str = "pooled"

  @property
  def kinds(self) -> tuple[str, ...]:
    return (self.features,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNN(OnFeatures):
  """k nearest neighbours; the bank is all that may be learned from."""

  k: int = 20
  metric: str = "cosine"
  temperature: float = 0.07

  source: ClassVar[str] = "DINO, arXiv 2104.14294, F.1 (cosine); scikit-learn (euclidean)"

  def __call__(self, material: Material, *, seed: int) -> dict[str, float]:
    del seed  # nothing is drawn
    score = knn.accuracy(
      material.x("train", self.features),
      material.y("train"),
      material.x("score", self.features),
      material.y("score"),
      num_classes=material.num_classes,
      k=self.k,
      metric=self.metric,
      temperature=self.temperature,
    )
    return {"accuracy": score}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logistic(OnFeatures):
  """Logistic regression to its optimum, on standardised features; C chosen if several are given.

  share: of the labels, class-balanced, drawn by the seed; 1 for all.
  """

  C: tuple[float, ...] = (1.0,)
  max_steps: int = 300
  share: float = 1.0

  source: ClassVar[str] = "scikit-learn's LogisticRegression"

  def __call__(self, material: Material, *, seed: int) -> dict[str, float]:
    best = self.C[0]
    options = dict(num_classes=material.num_classes, max_steps=self.max_steps)
    choose = material.x("choose", self.features), material.y("choose")
    if len(self.C) > 1:
      x, y = self._labelled(material, "fit", seed)
      best = max(self.C, key=lambda C: linear.accuracy(x, y, *choose, C=C, **options))
    x, y = self._labelled(material, "train", seed)
    score = material.x("score", self.features), material.y("score")
    found = {"accuracy": linear.accuracy(x, y, *score, C=best, **options)}
    return found | ({"chosen_C": best} if len(self.C) > 1 else {})

  def _labelled(self, material: Material, part: str, seed: int):
    x, y = material.x(part, self.features), material.y(part)
    if self.share == 1:
      return x, y
    rows = splits.share(y, num_classes=material.num_classes, share=self.share, seed=seed)
    return x[rows], y[rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Protocol):
  """A grid of learning rates and weight decays trained at once; the best on the chosen-on rows.

  recipe: 'dinov2' (SGD, 13 rates), 'ijepa' (LARS, 3 rates x 2 decays) or 'mae' (LARS, BatchNorm).
  features: kinds of features, tried in turn. norms: before the linear layer, tried in turn; those
    of the recipe where empty. steps: of 'dinov2', at least; the others count epochs.
  """

  recipe: str
  features: tuple[str, ...]
  norms: tuple[str, ...] = ()
  steps: int = 2000

  @property
  def source(self) -> str:
    return {
      "dinov2": "facebookresearch/dinov2, dinov2/eval/linear.py",
      "ijepa": "arXiv 2301.08243, appendix A.2",
      "mae": "facebookresearch/mae, main_linprobe.py",
    }[self.recipe]

  @property
  def kinds(self) -> tuple[str, ...]:
    return self.features

  def __call__(self, material: Material, *, seed: int) -> dict[str, float]:
    kinds = [kind for kind in self.features if material.has(kind)]
    tried = [
      (grid.fit(
        material.x("fit", kind),
        material.y("fit"),
        material.x("choose", kind),
        material.y("choose"),
        num_classes=material.num_classes,
        grid=settings,
        seed=seed,
      ), kind)
      for kind, settings in itertools.product(kinds, self._grids(len(material.y("fit"))))
    ]  # fmt: skip
    fit, kind = max(tried, key=lambda pair: pair[0].accuracies.max())
    score = material.x("score", kind), material.y("score")
    return {
      "accuracy": float(grid.accuracy(fit.head, *score)),
      "chosen_learning_rate": fit.learning_rate,
      "chosen_weight_decay": fit.weight_decay,
    }

  def _grids(self, count: int) -> list[grid.Grid]:
    batch = min(1024, count)
    epochs = -(-self.steps // (count // batch))
    first = {
      "dinov2": lambda: grid.dinov2(batch_size=batch, epochs=epochs),
      "ijepa": lambda: lars.ijepa(count),
      "mae": lambda: lars.mae(count),
    }[self.recipe]()
    return [dataclasses.replace(first, norm=norm) for norm in self.norms] or [first]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attentive(Protocol):
  """A learned query attends to the frozen tokens; rate and decay chosen.

  settings: of `attentive.Attentive`; heads are those of the encoder.
  """

  learning_rates: tuple[float, ...] = (3e-3, 1e-3, 3e-4)
  weight_decays: tuple[float, ...] = (0.01, 0.1)
  epochs: int = 20
  batch_size: int = 256

  kinds: ClassVar[tuple[str, ...]] = ("tokens",)
  blocks: ClassVar[bool] = True
  source: ClassVar[str] = "V-JEPA 2, arXiv 2506.09985, with one cross-attention block as V-JEPA"

  def __call__(self, material: Material, *, seed: int) -> dict[str, float]:
    fit = attentive.fit(
      material.x("fit", "tokens"),
      material.y("fit"),
      material.x("choose", "tokens"),
      material.y("choose"),
      num_classes=material.num_classes,
      protocol=attentive.Attentive(
        **dataclasses.asdict(self), heads=material.encoder.module.heads, warmup_epochs=1
      ),
      seed=seed,
    )
    return {
      "accuracy": attentive.accuracy(fit, material.x("score", "tokens"), material.y("score")),
      "chosen_learning_rate": fit.learning_rate,
      "chosen_weight_decay": fit.weight_decay,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune(Protocol):
  """The whole encoder trained on the labels; its control is training from scratch.

  share: of the labels, class-balanced, drawn by the seed. batch_size: at most; of few labels a
  25th, so that an epoch has 25 steps. The rest: see `finetune.FineTune`; learning_rate is per 256
  images, layer_decay of pretrained weights alone: a fresh network learns all layers alike.
  """

  share: float = 1.0
  epochs: int = 20
  batch_size: int = 256
  learning_rate: float = 1e-3
  layer_decay: float = 0.75
  weight_decay: float = 0.05
  drop_path: float = 0.1
  label_smoothing: float = 0.1
  crop_scale: tuple[float, float] = (0.6, 1.0)
  flip: float = 0.5

  images: ClassVar[bool] = True
  blocks: ClassVar[bool] = True
  source: ClassVar[str] = "MAE, arXiv 2111.06377, A.2, with settings for small images"

  def __call__(self, material: Material, *, seed: int) -> dict[str, float]:
    images, labels = material.images("train"), material.y("train")
    if self.share < 1:
      classes = material.num_classes
      rows = splits.share(labels, num_classes=classes, share=self.share, seed=seed)
      images, labels = images[rows], labels[rows]
    settings = dataclasses.asdict(self)
    del settings["share"]
    batch = min(self.batch_size, max(2, len(labels) // 25))
    if material.subject == "random_init":
      settings["layer_decay"] = 1.0
    settings |= {"batch_size": batch, "learning_rate": self.learning_rate * batch / 256}
    tuned = finetune.fit(
      material.encoder,
      images,
      labels,
      num_classes=material.num_classes,
      protocol=finetune.FineTune(warmup_epochs=min(5, self.epochs), **settings),
      seed=seed,
    )
    score = material.images("score"), material.y("score")
    return {"accuracy": finetune.accuracy(tuned, *score, batch_size=material.batch_size)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry(OnFeatures):
  """Numbers of the scored features that need no label: spread, ranks, dimension.

  limit: rows compared.
  """

  limit: int = 10_000

  source: ClassVar[str] = (
    "RankMe arXiv 2210.02885, alpha-ReQ 2202.05808, uniformity 2005.10242, correlation dimension "
    "as scikit-dimension's CorrInt"
  )

  def __call__(self, material: Material, *, seed: int) -> dict[str, float]:
    del seed
    x = material.x("score", self.features)[: self.limit]
    return {
      **collapse.numbers(x),
      "alpha_req": geometry.alpha_req(x),
      "uniformity": geometry.uniformity(x),
      "correlation_dimension": geometry.correlation_dimension(x),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views(Protocol):
  """How features stand to augmentation: LiDAR, and alignment of two views.

  limit: images. views: of each. crop_scale, flip: of the views.
  """

  limit: int = 1000
  views: int = 10
  crop_scale: tuple[float, float] = (0.3, 1.0)
  flip: float = 0.5

  images: ClassVar[bool] = True
  source: ClassVar[str] = "LiDAR arXiv 2312.04000; alignment 2005.10242"

  def __call__(self, material: Material, *, seed: int) -> dict[str, float]:
    images = material.images("score")[: self.limit]
    # Augmentations normalise; with these statistics they don't, and pixels go on as u8.
    channels = images.shape[-1]
    augment = Augment(
      mean=(0.0,) * channels, std=(1.0,) * channels, crop_scale=self.crop_scale, flip=self.flip
    )

    @jax.jit
    def draw(keys, images):
      return (augment(keys, images) * 255).round().astype(np.uint8)

    drawn = []
    for key in jax.random.split(jax.random.key(seed), self.views):
      view = np.asarray(draw(jax.random.split(key, len(images)), images))
      drawn.append(material.encode(view, kind="pooled"))
    stacked = np.stack(drawn, 1)  # [n q d]
    return {
      "lidar": geometry.lidar(stacked),
      "alignment": geometry.alignment(stacked[:, 0], stacked[:, 1]),
    }
