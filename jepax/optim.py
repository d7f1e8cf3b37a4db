"""Schedules, parameter groups, and the optax chain that a config describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jepax.names import one_of
from jepax.sharding import is_stacked

Schedule = Callable[[Any], jax.Array]

# By name, since a scanned stack gives biases a second axis.
NOT_DECAYED = ("bias", "scale", "scale1", "scale2")


def linear(start: float, end: float, *, steps: int) -> Schedule:
  """start at step 0, end at `steps`, and there ever after."""
  return lambda step: start + (end - start) * jnp.clip(step / steps, 0.0, 1.0)


def cosine(start: float, end: float, *, steps: int) -> Schedule:
  """Half a cosine from start at step 0 to end at `steps`, and there ever after."""
  return lambda step: (
    end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0.0, 1.0)))
  )


def warmup_cosine(start: float, peak: float, final: float, *, warmup: int, steps: int) -> Schedule:
  """Linear from `start` to `peak` over `warmup` steps, then a cosine to `final` at `steps`.

  Source: facebookresearch/ijepa 52c1ae9, src/utils/schedulers.py, whose `steps` include the
  warm-up.
  """
  decay = cosine(peak, final, steps=max(1, steps - warmup))

  def schedule(step):
    rising = start + (peak - start) * step / max(1, warmup)
    return jnp.where(step < warmup, rising, decay(step - warmup))

  return schedule


def decayed(params: Any) -> Any:
  """True for the leaves that weight decay moves: all but biases and norm scales.

  The mask and class tokens are decayed, as in I-JEPA and MAE.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def trust_ratio(coefficient: float = 1e-3) -> optax.GradientTransformation:
  """LARS: each update gets `coefficient` times the norm of its parameter.

  Biases and norm scales pass as they are, as does a tensor whose parameter or update is zero.
  Each layer of a scanned stack has norms of its own, as it has where the stack is unrolled.

  Source: arXiv 1708.03888, in the form of MoCo v3, MAE and VICReg.
  """

  def scale(path, update, param):
    if path[-1].key in NOT_DECAYED:
      return update
    axes = tuple(range(int(is_stacked(path)), param.ndim))
    size, length = (jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (param, update))
    return update * jnp.where((size > 0) & (length > 0), coefficient * size / length, 1.0)

  return optax.stateless(
    lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, params)
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """tx: the optax chain. schedules: name -> step -> value, for the log."""

  tx: optax.GradientTransformation
  schedules: dict[str, Schedule]


def build(section: ConfigDict, *, steps: int, warmup: int) -> Optimizer:
  """The optimizer a config's section `optim` describes.

  Args:
    section: see `jepax.config.base`.
    steps: optimizer steps of the run, warm-up included.
    warmup: steps of warm-up.

  Raises:
    ValueError: an unknown name, a warm-up longer than the run, negative numbers.
  """
  _check(section, steps=steps, warmup=warmup)
  lr = warmup_cosine(section.start_lr, section.lr, section.final_lr, warmup=warmup, steps=steps)
  decay = cosine(section.weight_decay, section.final_weight_decay, steps=steps)
  # The reference advances its schedulers before the step: update number k uses step k + 1.
  schedules = {
    "schedule/learning_rate": lambda step: lr(step + 1),
    "schedule/weight_decay": lambda step: decay(step + 1),
  }
  rate = _rate(schedules["schedule/learning_rate"], section)
  weight_decay = optax.add_decayed_weights(schedules["schedule/weight_decay"], mask=decayed)
  chain = {
    "adamw": [optax.scale_by_adam(b1=section.b1, b2=section.b2), weight_decay, rate],
    # Not optax.lars, which scales by the learning rate before the momentum.
    "lars": [weight_decay, trust_ratio(), optax.trace(section.b1), rate],
  }[section.name]
  if section.clip:
    chain.insert(0, optax.clip_by_global_norm(section.clip))
  return Optimizer(optax.chain(*chain), schedules)


def _rate(schedule: Schedule, section: ConfigDict) -> optax.GradientTransformation:
  """Minus the learning rate, constant for one part of the parameters where the config names it."""
  rate = optax.scale_by_learning_rate(schedule)
  if not section.unscheduled:
    return rate

  def labels(params):
    one_of(section.unscheduled, params, where="optim.unscheduled")
    return {name: name == section.unscheduled for name in params}

  return optax.partition({False: rate, True: optax.scale_by_learning_rate(section.lr)}, labels)


def _check(section: ConfigDict, *, steps: int, warmup: int) -> None:
  one_of(section.name, ("adamw", "lars"), where="optim.name")
  if warmup > steps:
    raise ValueError(
      f"optim.warmup={section.warmup!r} is {warmup} steps but the run only {steps}; shorten it or "
      "lengthen total"
    )
  for key in ("lr", "start_lr", "final_lr", "weight_decay", "final_weight_decay", "clip"):
    if not section[key] >= 0:
      raise ValueError(f"optim.{key}={section[key]!r} must not be negative")
  for key in ("b1", "b2"):
    if not 0 <= section[key] < 1:
      raise ValueError(f"optim.{key}={section[key]!r} must lie in [0, 1)")
