"""Weights that a run starts from, `config.init`: released ones, or those of another run.

`read_start` reads and checks them before anything compiles; `Start.into` puts them into the state
of step 0. Where a method keeps its encoder it tells itself: its `weights` only picks leaves, so,
given a tree of their places, it returns the places of a branch's encoder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from jepax.checkpoint import finished_steps
from jepax.convert import source
from jepax.convert.weights import STACKED, Weights, prefixed, stacked, under
from jepax.core import TrainState
from jepax.data.build import Data
from jepax.experiment import Experiment
from jepax.names import one_of

SHOWN = 4  # differences that an error names
# Fields of a module that change how it starts, trains or is computed, not what its weights mean;
# and the positions, which are looked at on their own.
FREE = (
  *("parent", "name", "dtype", "scan", "remat", "attention", "init_name", "token_std", "zero_init"),
  *("drop_path", "drop_path_shape", "resize", "mask_token", "position", "grid"),
)
MASK_TOKEN = "mask_token"  # no feature depends on it: where one side has none it is left alone
SAME_NORMALISATION = 1e-3  # of the range of pixels, a quarter of a grey level


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Start:
  """Weights that fit a run.

  origin: where they come from, in words. text: that, and which network takes what, in one line.
  values: place in the state, 'params/encoder/embed/kernel' -> what goes there; `into` empties it.
  """

  origin: str
  text: str
  values: dict[str, np.ndarray]

  def into(self, state: TrainState) -> TrainState:
    """The state with these weights, placed as they were; the optimizer's stays. Call it once."""

    def put(path, leaf):
      value = self.values.pop(_place(path), None)  # the host needs its copy no longer
      if value is None:
        return leaf
      # Buffers of their own: the state is donated, and branches may share a value.
      return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: value[at].copy())

    trees = {"params": state.params, "carry": state.carry}
    return state.replace(**jax.tree_util.tree_map_with_path(put, trees))


def read_start(experiment: Experiment, workdir: Path) -> Start | None:
  """What config.init names; None for nothing, or where the workdir has a checkpoint to go on from.

  Raises:
    ValueError: no weights there, or weights that don't fit the run: the settings or parameters
      that differ, and the keys to change.
  """
  init = experiment.config.init
  if not init.weights or finished_steps(workdir / "checkpoints"):
    return None
  weights = source.read(str(init.weights), method=_own_method(experiment, str(init.weights)))
  if init.branch:
    one_of(init.branch, weights.branches, where="init.branch")
  where = f"init.weights={init.weights!r}"
  section = experiment.config.method.get("encoder", {})
  _check_encoder(weights.module, experiment.method.encoder, section=section, where=where)
  _check_normalisation(weights, experiment.data, where=where)
  weights = _at_grid(weights, experiment, where=where)
  taken = _branches(experiment.method.branches, tuple(weights.branches), chosen=init.branch)
  values = _encoders(weights, experiment, taken, where=where)
  texts = [f"{branch} encoder from {name!r}" for branch, name in taken.items()]
  for name in experiment.abstract_state.params:
    if name != "encoder":
      found, text = _part(name, weights, experiment)
      values |= found
      texts.append(f"{name} {text}")
  origin = "{path} ({format}, sha256 {sha256})".format(**weights.origin)
  return Start(origin=origin, text=f"{origin}: {', '.join(texts)}", values=values)


def _own_method(experiment: Experiment, path: str) -> Any:
  """The method that the caller gave, where the weights are those of a run that was given one."""
  claimed = Path(path).expanduser() / "config.json"
  if experiment.config.method or not claimed.is_file():
    return None
  return experiment.method if "given_method" in json.loads(claimed.read_text()) else None


# --- which set goes where -----------------------------------------------------------------------


def _branches(wanted: tuple[str, ...], held: tuple[str, ...], *, chosen: str) -> dict[str, str]:
  """The run's branch -> the source's: of one name where the source has all of several."""
  if not chosen and len(wanted) > 1 and set(wanted) <= set(held):
    return {branch: branch for branch in wanted}
  return dict.fromkeys(wanted, chosen or held[0])


def places(method: Any, state: TrainState) -> dict[str, dict[str, str]]:
  """Branch -> leaf of its encoder, 'embed/kernel' -> where that lies, 'carry/target/embed/kernel'.

  Args:
    method: any.
    state: arrays or their shapes.
  """
  trees = {"params": state.params, "carry": state.carry}
  named = jax.tree_util.tree_map_with_path(lambda path, _: _place(path), trees)
  return {
    branch: flatten_dict(method.weights(**named, branch=branch), sep="/")
    for branch in method.branches
  }


def _encoders(
  weights: Weights, experiment: Experiment, taken: Mapping[str, str], *, where: str
) -> dict[str, np.ndarray]:
  """Place -> value, of every copy of the encoder that the state holds."""
  leaves = _leaves(experiment.abstract_state)
  found = places(experiment.method, experiment.abstract_state)
  first = experiment.method.branches[0]
  values = {}
  # The first branch last: leaves that branches share, as a frozen patch projection, are then its.
  for branch in reversed(experiment.method.branches):
    flat = _stacked_as(found[branch], weights.branches[taken[branch]])
    shapes = _shapes({name: leaves[place] for name, place in found[branch].items()})
    _check_shapes(_shapes(flat), shapes, where=where)
    values |= {place: flat[name] for name, place in found[branch].items() if name in flat}
  for beginning in _copies(leaves, shapes, among=leaves.keys() - values.keys()):
    values |= {beginning + name: values[found[first][name]] for name in shapes if name in flat}
  return values


def _copies(leaves: Mapping[str, Any], shapes: Mapping[str, tuple], *, among: set[str]) -> list:
  """Beginnings of what else in the carry is an encoder leaf by leaf: DINOv2's Gram teacher."""
  anchor = next(iter(shapes))
  beginnings = [
    p.removesuffix(anchor) for p in among if p.startswith("carry/") and p.endswith(f"/{anchor}")
  ]
  return [
    b
    for b in beginnings
    if all(b + n in leaves and leaves[b + n].shape == shape for n, shape in shapes.items())
  ]


def _part(name: str, weights: Weights, experiment: Experiment) -> tuple[dict, str]:
  """Place -> value of a network beside the encoder, nothing unless it is the run's; and a text."""
  if name not in weights.parts:
    return {}, "at random (they have none)"
  part, own = weights.parts[name], getattr(experiment.method, name)
  if type(part.module) is not type(own):
    return {}, f"at random (theirs is a {type(part.module).__name__})"
  leaves = under(f"params/{name}", _leaves(experiment.abstract_state))
  flat = _stacked_as(leaves, part.params)
  differ = _differences(part.module, own)
  if not differ and _shapes(flat) != _shapes(leaves):
    differ = ["shapes"]
  if differ:
    return {}, f"at random (theirs has another {', '.join(differ[:SHOWN])})"
  return prefixed(f"params/{name}", flat), "too"


def _stacked_as(names: Mapping[str, Any], flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The weights with their blocks stacked, where those of these names are."""
  return stacked(flat) if any(name.startswith(STACKED) for name in names) else flat


def _leaves(state: TrainState) -> dict[str, Any]:
  """'params/encoder/embed/kernel' -> leaf, of the parameters and the carry."""
  trees = {"params": state.params, "carry": state.carry}
  return {_place(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]}


def _shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {name: leaf.shape for name, leaf in leaves.items()}


def _place(path: jax.tree_util.KeyPath) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


# --- whether they fit ---------------------------------------------------------------------------


def _check_encoder(
  theirs: nn.Module, own: nn.Module, *, section: Mapping[str, Any], where: str
) -> None:
  """Raises ValueError where the weights are of another architecture than the run's encoder."""
  kinds = type(theirs).__name__, type(own).__name__
  if kinds[0] != kinds[1]:
    raise ValueError(
      f"{where} holds a {kinds[0]}, and the run's encoder is a {kinds[1]}: set "
      "method.encoder.variant to one of its kind, or choose other weights"
    )
  differ = _differences(theirs, own)
  if differ:
    values = {name: _setting(theirs, name) for name in differ}
    shown = [f"{n}={x!r} (here {_setting(own, n)!r})" for n, x in list(values.items())[:SHOWN]]
    more = f" and {len(differ) - SHOWN} more" * (len(differ) > SHOWN)
    decided = "class_token" in values and "class_token" not in section
    keys = shlex.join(f"--config.method.encoder.{n}={x}" for n, x in values.items())
    remedy = "; the method decides on a class token" if decided else f", or set {keys}"
    raise ValueError(
      f"{where} does not fit the run's encoder: it has {', '.join(shown)}{more}. Choose other "
      f"weights{remedy}"
    )


def _differences(theirs: nn.Module, own: nn.Module) -> list[str]:
  """Fields in which two modules of a class mean different things by their weights."""
  names = [f.name for f in dataclasses.fields(own) if f.name not in FREE]
  differ = [n for n in names if _setting(theirs, n) != _setting(own, n)]
  scales = [getattr(m, "layer_scale", None) is None for m in (theirs, own)]
  if scales[0] == scales[1]:  # a number is where it starts
    differ = [n for n in differ if n != "layer_scale"]
  return differ


def _setting(module: nn.Module, name: str) -> Any:
  value = getattr(module, name)
  return 4 * module.width if name == "mlp_width" and value is None else value


def _check_normalisation(weights: Weights, data: Data, *, where: str) -> None:
  """Raises ValueError where the run's images would come to the encoder as it never saw any."""
  theirs = weights.preprocess
  if weights.channels != data.channels:
    raise ValueError(
      f"{where} is of images of {weights.channels} channel(s), and data.channels={data.channels}: "
      f"set --config.data.channels={weights.channels}, with mean and std of as many"
    )
  pairs = zip((*theirs.mean, *theirs.std), (*data.mean, *data.std), strict=True)
  if all(math.isclose(a, b, rel_tol=0, abs_tol=SAME_NORMALISATION) for a, b in pairs):
    return
  mean, std = (str(x).replace(" ", "") for x in (theirs.mean, theirs.std))
  remedy = f"--config.data.mean='{mean}' --config.data.std='{std}'"
  if data.given:
    remedy = f"mean={mean} and std={std} in Data.from_arrays"
  raise ValueError(
    f"{where} was trained on images normalised by mean={theirs.mean}, std={theirs.std}, and this "
    f"run's by data.mean={data.mean}, data.std={data.std}: set {remedy}"
  )


def _at_grid(weights: Weights, experiment: Experiment, *, where: str) -> Weights:
  """The weights with positions for the run's grid of patches, in the form that the run has them."""
  own, positions = experiment.method.encoder, experiment.config.init.positions
  size = own.grid[0] * own.patch if own.grid else experiment.data.size
  try:
    weights = weights.at(size=size, positions=positions or None)
  except ValueError as error:
    raise ValueError(f"{where} (choose by init.positions): {error}") from error
  if own.position == "learned":
    return weights.tabled()
  if own.position == weights.module.position:
    return weights
  try:  # a table that holds what the run computes
    return weights.at(positions="recompute")
  except ValueError as error:
    raise ValueError(
      f"{where} has positions in a table, and the run's encoder computes sin-cos ones, which are "
      f"others: set init.positions='recompute' if theirs are sin-cos at their own size, or "
      f"--config.method.encoder.position=learned "
      f"--config.method.encoder.grid='{str(weights.module.grid).replace(' ', '')}'"
    ) from error


def _check_shapes(found: Mapping[str, tuple], wanted: Mapping[str, tuple], *, where: str) -> None:
  """Raises ValueError naming parameters that differ where no setting says so."""

  def show(name: str, shapes: Mapping[str, tuple]) -> str:
    return str(list(shapes[name])) if name in shapes else "none"

  names = [n for n in sorted({*found, *wanted}) if show(n, found) != show(n, wanted)]
  names = [n for n in names if n != MASK_TOKEN or (n in found and n in wanted)]
  if names:
    texts = [f"{n} {show(n, found)}, here {show(n, wanted)}" for n in names[:SHOWN]]
    more = f"; and {len(names) - SHOWN} more" * (len(names) > SHOWN)
    raise ValueError(
      f"{where} does not fit the run's encoder: {'; '.join(texts)}{more}. Change method.encoder, "
      "data.size or data.channels, or choose other weights"
    )
