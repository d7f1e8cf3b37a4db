"""The encoder of a training run, from its checkpoints alone: no training data, no optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from jepax import config as config_lib
from jepax import given
from jepax.checkpoint import Checkpoints, diff
from jepax.convert.weights import Part, Weights, flatten
from jepax.core import Method
from jepax.data import build as data_build
from jepax.models.predictor import Predictor
from jepax.models.transformer import Stack
from jepax.pretrained import Preprocess

CHECKPOINTS = "checkpoints"
# What whatever reads weights asks of an encoder's module (`models.encoder`).
TOLD = ("width", "patch", "prefix", "class_token", "position", "grid")


def read(
  workdir: Path, *, method: Method | Callable[[config_lib.Run], Method] | None = None
) -> Weights:
  """Every branch of a run's encoder, in the order of its method's `branches`; and its predictor.

  Reads only, so it is safe while the run goes on.

  Args:
    workdir: of the run. Its newest checkpoint is taken or, where early stopping keeps a best one,
      that, as in the run's own results.
    method: what `jepax.fit.run` was given, where the config does not name one.

  Raises:
    ValueError: no finished checkpoint; a method that is missing, or not the one that trained.
  """
  try:
    with Checkpoints(workdir / CHECKPOINTS) as saved:
      step, meta = saved.latest(), saved.meta()
      state = saved.read("params", "carry", step=step)
  except FileNotFoundError as error:
    raise ValueError(f"{error}; train for longer, or wait for the first save") from error
  if meta["memory"]["best_step"] not in (None, step):
    step = meta["memory"]["best_step"]
    with Checkpoints(workdir / "best") as best:
      state = best.read("params", "carry", step=step)
  config = _tuples(meta["config"])
  preprocess = _preprocess(meta, config)
  run = config_lib.Run(
    size=preprocess.size[0],
    channels=len(preprocess.mean),
    mean=preprocess.mean,
    std=preprocess.std,
    steps=max(step, 1),  # only schedules read it
    dtype=config_lib.PRECISIONS[config["precision"]],
  )
  if "given_method" in config:
    method = _given(method, run, trained=config["given_method"])
  elif method is not None:
    raise ValueError(f"the config of {workdir} names its method; leave out method=")
  else:
    method = config_lib.build_method(config["method"], run)
  branches = {
    name: flatten(method.weights(state["params"], state["carry"], branch=name))
    for name in method.branches
  }
  return Weights(
    module=_unstacked(method.encoder),
    branches=branches,
    parts=_predictor(method, state["params"]),
    preprocess=preprocess,
    pool=method.pool,
    origin={"path": str(workdir), "format": f"run, step {step}", "sha256": _sha256(branches)},
  )


def _given(method: Any, run: config_lib.Run, *, trained: Mapping[str, Any]) -> Method:
  """The method that the caller trained and gives again, or ValueError."""
  if method is None:
    raise ValueError(
      f"this run trained a method given in Python, {trained['type']}, which its config can't bring "
      "back: jepax.pretrained.load(workdir, method=...) takes it again"
    )
  method = given.resolve(method, run)
  different = diff(_encoder_of(trained), _encoder_of(given.describe(method)))
  if different:
    raise ValueError(f"method= is not the one that this run trained: {'; '.join(different)}")
  lacking = [name for name in TOLD if not hasattr(method.encoder, name)]
  if lacking:
    raise ValueError(
      f"the encoder {type(method.encoder).__name__} lacks {lacking}, which a frozen encoder must "
      "tell of itself (see jepax/models/encoder.py): class attributes will do, such as prefix = 0, "
      "class_token = False, position = 'none', grid = None; or encode by "
      "jepax.experiment.prepare(config, method=...).encoders(state)"
    )
  return method


def _encoder_of(described: Mapping[str, Any]) -> dict[str, Any]:
  """What of a described method its encoder's weights are read by; modules may be renamed."""

  def bare(value):
    if not isinstance(value, dict):
      return value
    return {k: x.rpartition(".")[2] if k == "type" else bare(x) for k, x in value.items()}

  return bare({key: described[key] for key in ("type", "encoder") if key in described})


def _unstacked(module: nn.Module) -> nn.Module:
  """The network whose blocks lie as `flatten` leaves them."""
  return module.clone(scan=False) if isinstance(module, Stack) else module


def _predictor(method: Any, params: Mapping[str, Any]) -> dict[str, Part]:
  """The predictor of a JEPA; those of methods that compare views are heads like others."""
  module = getattr(method, "predictor", None)
  if not isinstance(module, Predictor):
    return {}
  return {"predictor": Part(module=_unstacked(module), params=flatten(params["predictor"]))}


def _preprocess(meta: Mapping[str, Any], config: Mapping[str, Any]) -> Preprocess:
  """What the run did to its held-out images; older checkpoints don't say, their data do."""
  if "preprocess" in meta:
    return Preprocess(**_tuples(meta["preprocess"]))
  return Preprocess.of(data_build.build(ConfigDict(config["data"])))


def _sha256(branches: Mapping[str, Mapping[str, Any]]) -> str:
  """Of all parameters' bytes, in order of their names."""
  digest = hashlib.sha256()
  for params in branches.values():
    for path, x in params.items():
      digest.update(f"{path}{x.shape}".encode() + x.tobytes())
  return digest.hexdigest()


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
  """JSON knows lists only; configs and modules want tuples."""
  walk = {dict: _tuples, list: tuple}
  return {key: walk[type(v)](v) if type(v) in walk else v for key, v in values.items()}
