"""The encoder of a training run, from its checkpoints alone: no training data, no optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from jepax import config as config_lib
from jepax.checkpoint import Checkpoints
from jepax.convert.weights import Part, Weights, flatten
from jepax.data import build as data_build
from jepax.models.predictor import Predictor
from jepax.models.transformer import Stack
from jepax.pretrained import Preprocess

CHECKPOINTS = "checkpoints"


def read(workdir: Path) -> Weights:
  """Every branch of a run's encoder, in the order of its method's `branches`; and its predictor.

  Reads only, so it is safe while the run goes on.

  Args:
    workdir: of the run. Its newest checkpoint is taken or, where early stopping keeps a best one,
      that, as in the run's own results.

  Raises:
    ValueError: no finished checkpoint.
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
  method = config_lib.build_method(
    config["method"],
    config_lib.Run(
      size=preprocess.size[0],
      channels=len(preprocess.mean),
      mean=preprocess.mean,
      std=preprocess.std,
      steps=max(step, 1),  # only schedules read it
      dtype=config_lib.PRECISIONS[config["precision"]],
    ),
  )
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
