"""Encoders through protocols: every number beside its controls, over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from jepax.data.build import Data
from jepax.data.sources import ArraySource, Source
from jepax.evals import material, scene_protocols
from jepax.names import one_of
from jepax.pretrained import Encoder
from jepax.report.protocols import cell

SPLITS = ("validation", "test")


def evaluate(
  encoders: Sequence[Encoder],
  data: Data,
  protocols: Mapping[str, Any],
  *,
  split: str = "validation",
  seeds: int = 1,
  limit: int = 100_000,
  batch_size: int = 256,
  pixels: bool = True,
) -> dict[str, Any]:
  """Scores encoders and the pixels by protocols.

  Args:
    encoders: `jepax.pretrained.Encoder`s of one preprocessing, the one of interest first. Give a
      control: `encoder.random()`.
    data: `jepax.data.build.Data` with labels.
    protocols: name -> protocol, from `jepax.evals.registry.PROTOCOLS` or like those.
    split: 'validation' scores a tenth of the training images, 'test' the test split; settings are
      chosen on neither.
    seeds: repetitions with seeds 0, 1, ... of the splits and the probes.
    limit: training images at most.
    batch_size: images a forward pass.
    pixels: whether to score the raw pixels, too.

  Returns:
    protocol -> {'source', 'settings', 'scores': subject -> number -> {'mean', 'std',
    'seeds'}}; 'std' is over seeds, with one degree of freedom less, 0 for one seed.

  Raises:
    ValueError: no labels, no test split where it is asked for, or a protocol that no encoder here
      can answer.
  """
  one_of(split, SPLITS, where="split")
  if min(seeds, limit, batch_size) < 1:
    raise ValueError(
      f"seeds, limit and batch_size must be at least 1, found {seeds}, {limit}, {batch_size}"
    )
  names = [encoder.name for encoder in encoders]
  if not names or len(set(names)) < len(names):  # scores are kept by name
    raise ValueError(f"encoders must be one or more, each with a name of its own; found {names}")
  own = {name: p for name, p in protocols.items() if p.scene is None}
  if own and data.num_classes is None:
    raise ValueError("these images have no labels, and the protocols score labels")
  if own and split == "test" and data.test is None:
    raise ValueError("there is no test split; score held-out training images: split='validation'")
  check(encoders, protocols)
  options = dict(encoders=encoders, seeds=seeds, limit=limit, batch_size=batch_size, pixels=pixels)
  found = {}
  if own:
    test = data.test if split == "test" else None
    found |= _group(own, data.train, test, num_classes=data.num_classes, **options)
  for scene in {p.scene for p in protocols.values() if p.scene is not None}:
    asked = {name: p for name, p in protocols.items() if p.scene == scene}
    sets = (_scene_source(scene, part) for part in ("train", "score"))
    found |= _group(asked, *sets, num_classes=None, **options)
  return {name: _summary(protocols[name], found[name]) for name in protocols}


def check(encoders: Sequence[Encoder], protocols: Mapping[str, Any]) -> None:
  """Raises ValueError where a protocol asks for what no encoder here has."""
  offered = {kind for encoder in encoders for kind in encoder.offered}
  for name, protocol in protocols.items():
    if protocol.kinds and not offered & set(protocol.kinds):
      kinds = " or ".join(protocol.kinds)
      raise ValueError(f"{name} takes {kinds} features, and no encoder here has them")
    if protocol.blocks:
      for encoder in encoders:
        encoder.check_blocks(name)


def _group(
  protocols: Mapping[str, Any],
  train: Source,
  test: Source | None,
  *,
  encoders: Sequence[Encoder],
  num_classes: int | None,
  seeds: int,
  limit: int,
  batch_size: int,
  pixels: bool,
) -> dict[str, dict[str, list]]:
  """Protocols of one set of images: name -> subject -> what it found, a dict a seed."""
  needs = dict(
    kinds=sorted({kind for p in protocols.values() for kind in p.kinds}),
    batch_size=batch_size,
    keep_images=any(p.images for p in protocols.values()),
  )
  tables = {False: material.collect(train, encoders, limit=limit, **needs)}
  if test is not None:
    tables[True] = material.collect(test, encoders, limit=len(test), **needs)
  found = {name: {} for name in protocols}
  for seed in range(seeds):
    fold = material.fold(*tables.values(), num_classes=num_classes, seed=seed)
    for encoder in (*encoders, None) if pixels else encoders:
      given = material.Material(
        subject=material.PIXELS if encoder is None else encoder.name,
        encoder=encoder,
        tables=tables,
        fold=fold,
        grid=encoders[0].grid,
        num_classes=num_classes,
        batch_size=batch_size,
      )
      for name, protocol in protocols.items():
        if protocol.fits(given):
          logging.info("%s of %s, seed %d", name, given.subject, seed)
          found[name].setdefault(given.subject, []).append(protocol(given, seed=seed))
  return found


def _scene_source(scene: str, part: str) -> ArraySource:
  """Rendered scenes whose labels are their numbers, see `scene_protocols`."""
  images = scene_protocols.rendered(scene, part).image
  return ArraySource(images, np.arange(len(images)), None)


def _summary(protocol, runs: Mapping[str, list[Mapping[str, float]]]) -> dict[str, Any]:
  """Mean and spread of each number of each subject, with what the protocol is."""
  scores = {
    subject: {number: _spread([row[number] for row in rows]) for number in rows[0]}
    for subject, rows in runs.items()
  }
  return {
    "source": protocol.source,
    "settings": {"protocol": type(protocol).__name__, **dataclasses.asdict(protocol)},
    "scores": scores,
  }


def _spread(values: Sequence[float]) -> dict[str, Any]:
  std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
  return {"mean": float(np.mean(values)), "std": std, "seeds": [float(v) for v in values]}


def headline(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """protocol -> subject -> mean accuracy, of the protocols that measure one."""
  found = {
    name: {s: numbers["accuracy"]["mean"] for s, numbers in result["scores"].items()}
    for name, result in results.items()
    if all("accuracy" in numbers for numbers in result["scores"].values())
  }
  return {name: scores for name, scores in found.items() if scores}


def table(results: Mapping[str, Any]) -> str:
  """The results as lines of text: protocol, number, and a column a subject."""
  subjects = list(dict.fromkeys(s for r in results.values() for s in r["scores"]))
  lines = [f"{'':28}" + "".join(f"{subject:>16}" for subject in subjects)]
  for name, result in results.items():
    numbers = dict.fromkeys(n for scores in result["scores"].values() for n in scores)
    for number in numbers:
      cells = (cell(result["scores"], subject, number) for subject in subjects)
      lines.append(f"{f'{name} {number}':28}" + "".join(f"{cell:>16}" for cell in cells))
  return "\n".join(lines)
