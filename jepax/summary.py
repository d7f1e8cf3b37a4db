"""What a run ends with: probes beside their controls, results.json and report.html."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jepax import report, sharding
from jepax.core import TrainState
from jepax.data.loader import take
from jepax.evals import collapse, pictures
from jepax.evals.features import extract_tokens, pixels
from jepax.evals.online import SCORES, Probe
from jepax.evals.predictor import retrieval
from jepax.experiment import HELD_OUT_LOSS, Experiment
from jepax.masks.tokens import to_bool
from jepax.methods.jepa import JEPA
from jepax.metrics import read_history, write_json
from jepax.versions import environment

MAP_POINTS = 2000  # dots in the embedding map
SHOWN_IMAGES = 8
NEIGHBOURS = 8
RETRIEVED = 64  # images among which predictions are looked up
CONTROLS = ("start", "random_init")  # encoders that training has not touched


def make_probe(experiment: Experiment, *, final: bool) -> Probe:
  """The probe of a run: a bank of training images and held-out queries, the same every time.

  Args:
    experiment: the run.
    final: whether for results.json, with config.eval.final_bank and final_queries images, or
      for the probes during training. Without held-out data the bank is its own query set and
      only the collapse numbers are measured.
  """
  data, c = experiment.data, experiment.config.eval
  bank_size, query_size = (c.final_bank, c.final_queries) if final else (c.bank, c.queries)
  bank = take(data.train, data.eval_transform, count=bank_size, seed=0)
  queries = (
    bank if data.test is None else take(data.test, data.eval_transform, count=query_size, seed=0)
  )
  if len(queries["image"]) < 2:
    raise ValueError(
      "there is 1 held-out image; collapse is seen across images: give 2 or more, such as by a "
      "larger data.eval_fraction"
    )
  labelled = data.test is not None and "label" in bank and "label" in queries
  labelled = labelled and data.num_classes > 1  # one folder of images is no class
  return Probe(bank, queries, data.num_classes if labelled else None, c.batch_size)


def alarms(
  found: Mapping[str, Mapping[str, float]], *, control: Mapping[str, float] | None, count: int
) -> list[str]:
  """What collapsed, one text an encoder.

  Args:
    found: encoder -> its numbers, of `collapse.numbers` and 'dim'.
    control: the numbers at random initialisation.
    count: images they are of.
  """
  texts = [
    collapse.alarm(branch, numbers, dim=numbers["dim"], count=count, control=control)
    for branch, numbers in found.items()
    if branch not in CONTROLS
  ]
  return [text for text in texts if text]


def probe_start(experiment: Experiment, state: TrainState, *, origin: str) -> dict[str, Any]:
  """The final probes of the weights that a run starts from, as JSON: they may be gone at its end.

  Args:
    experiment: the run.
    state: of step 0, with those weights.
    origin: where they come from, in words.
  """
  encode = experiment.encoders(state)[experiment.method.branches[0]]
  numbers = make_probe(experiment, final=True)({"start": encode})["start"]
  return {"origin": origin, "numbers": numbers, "settings": _settings(experiment)}


def _settings(experiment: Experiment) -> list[Any]:
  """What the final probes depend on and may change within a run."""
  c = experiment.config
  return [c.eval.final_bank, c.eval.final_queries, c.data.label]


def finish(
  experiment: Experiment,
  state: TrainState,
  workdir: Path,
  *,
  status: str,
  seconds: float,
  command: str,
  start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The final probes; writes results.json and report.html.

  Args:
    experiment: the run.
    state: what is evaluated.
    workdir: where metrics.jsonl lies and the files go.
    status: 'finished' or 'stopped'.
    seconds: of training.
    command: what reproduces the run.
    start: what `probe_start` found, of a run that started from weights.

  Returns:
    The content of results.json, on the first process: accuracies are fractions of 1, by probe and
    then by encoder
    ('target', 'online', 'start' of a run that started from weights, 'random_init', 'pixels').
  """
  probe = make_probe(experiment, final=True)
  encoders = experiment.encoders(state)
  first = experiment.method.branches[0]
  fresh = experiment.encoders(experiment.initial_state())[first]
  features = {name: probe.features(encode) for name, encode in encoders.items()}
  features["random_init"] = probe.features(fresh)
  found = {
    name: {**probe.scores(*both), **collapse.numbers(both[1]), "dim": both[1].shape[1]}
    for name, both in features.items()
  }
  if start is not None and start["settings"] == _settings(experiment):  # else of other images
    found["start"], found["random_init"] = start["numbers"], found.pop("random_init")
  for name, numbers in experiment.distances(state).items():
    found[name] |= numbers
  found["pixels"] = probe.scores(pixels(probe.bank["image"]), pixels(probe.queries["image"]))
  # All processes compute what follows from a sharded state; the first alone keeps books.
  held_out_loss = experiment.held_out_loss(state, probe.queries["image"])
  predictor = None
  if isinstance(experiment.method, JEPA):
    predictor = _retrieval(experiment, state, probe)
  shown = report.Pictures()
  if np.isfinite(features[first][1]).all():  # else it diverged: there is nothing to see
    shown = _pictures(experiment, state, probe, features[first], encoders[first])
  if jax.process_index() != 0:
    return {"train": {"status": status, "steps": int(state.step)}}
  count = len(probe.queries["image"])
  results = _results(experiment, workdir, found, status, seconds, count)
  if held_out_loss:
    results["train"]["held_out_loss"] = held_out_loss[HELD_OUT_LOSS]
  if predictor is not None:
    results["predictor"] = predictor
  if start is not None:
    results["train"]["start"] = start["origin"]
  write_json(workdir / "results.json", results)
  page = report.Report(
    title=f"{experiment.name} on {experiment.data.name}",
    command=command,
    config_text=json.dumps(experiment.described(), indent=2),
    environment=environment(),
    results=results,
    history=read_history(workdir),
    alarms=results["alarms"],
    pictures=shown,
  )
  report.write(workdir / "report.html", page)
  return results


def _results(experiment, workdir, found, status, seconds, count) -> dict[str, Any]:
  history = read_history(workdir)
  last = {name: value for row in history for name, value in row.items()}
  measured = {name: numbers for name, numbers in found.items() if name != "pixels"}
  return {
    **{s: {name: n[s] for name, n in found.items() if s in n} for s in SCORES},
    "collapse": {
      name: {k: v for k, v in numbers.items() if k not in SCORES}
      for name, numbers in measured.items()
    },
    "alarms": alarms(measured, control=measured["random_init"], count=count),
    "train": {
      "status": status,
      "steps": int(last["step"]),
      "seconds": seconds,
      "loss": last["train/loss"],
      "images_per_second": int(last["step"]) * experiment.config.batch_size / max(seconds, 1e-9),
      "bad_examples": int(last["input/bad_examples"]),
      "skipped": int(last["train/skipped"]),
    },
  }


def _retrieval(experiment: Experiment, state: TrainState, probe: Probe) -> dict[str, float]:
  """Whether predictions find their own place, and their own image, among held-out images."""
  images = _on_all_devices(experiment, probe.queries["image"][:RETRIEVED])
  key = jax.random.key(0)
  return retrieval(experiment.method, state.params, state.carry, images, key)


def _on_all_devices(experiment: Experiment, images: np.ndarray) -> jax.Array:
  place = sharding.replicated(experiment.mesh)
  return jax.make_array_from_callback(images.shape, place, lambda at: images[at])


def _pictures(experiment, state, probe: Probe, features, encode) -> report.Pictures:
  """Masks on real images, neighbours, the map, and patch colours, of the held-out images."""
  bank, queries = features
  images = probe.queries["image"][:SHOWN_IMAGES]
  near = pictures.nearest(queries[:SHOWN_IMAGES], bank, k=NEIGHBOURS)
  tokens = extract_tokens(encode, images, batch_size=probe.batch_size)
  side = math.isqrt(tokens.shape[1])
  square = side**2 == tokens.shape[1] and tokens.shape[2] >= 3  # else they make no picture
  labels = match = None
  if probe.num_classes is not None:
    labels = probe.queries["label"][:MAP_POINTS]
    match = probe.bank["label"][near] == labels[:SHOWN_IMAGES, None]
  return report.Pictures(
    # Reconstructions show the masks, too.
    **(_reconstructions(experiment, state, images) or _mask_pictures(experiment, state, images)),
    neighbour_queries=images,
    neighbours=probe.bank["image"][near],
    neighbour_labels=match,
    embedding=pictures.embed2d(queries[:MAP_POINTS]),
    labels=labels,
    class_names=experiment.data.class_names,
    pca_images=images if square else None,
    pca=pictures.patch_pca(tokens, (side, side)) if square else None,
  )


def _mask_pictures(experiment: Experiment, state: TrainState, images: np.ndarray) -> dict[str, Any]:
  """A draw of the masks, for methods that hide tokens."""
  draw = getattr(experiment.method, "draw_masks", None)
  if draw is None:
    return {}
  grid = experiment.method.grid
  masks = draw(jax.random.wrap_key_data(np.asarray(state.key)), {"image": images})
  context, targets = (to_bool(t, count=grid[0] * grid[1]) for t in (masks.context, masks.targets))
  if context.ndim == 3:  # several contexts, each with a target set of its own: the first is shown
    context, targets = context[:, 0], targets[:, :1]
  return {
    "images": images,
    "context": np.asarray(context),
    "targets": np.asarray(targets),
    "grid": grid,
  }


def _reconstructions(
  experiment: Experiment, state: TrainState, images: np.ndarray
) -> dict[str, Any]:
  """A draw of the masks and what is made of the images, for methods that predict pixels."""
  reconstruct = getattr(experiment.method, "reconstruct", None)
  if reconstruct is None:
    return {}
  key = jax.random.wrap_key_data(np.asarray(state.key))
  batch = {"image": _on_all_devices(experiment, images)}
  with jax.set_mesh(experiment.mesh):
    on_all = jax.jit(reconstruct, out_shardings=sharding.replicated(experiment.mesh))
    found = on_all(state.params, state.carry, batch, key)
  return {
    "reconstruction_images": images,
    "reconstruction": np.rint(255 * np.asarray(found.pixels)).astype(np.uint8),
    "is_masked": np.asarray(found.is_masked).reshape(-1, *experiment.method.grid),
  }
