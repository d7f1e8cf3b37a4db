"""Schedules, parameter groups, and the optax chain that a config describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jepax.config import one_of

Schedule = Callable[[Any], jax.Array]

NOT_DECAYED = ("bias", "scale")  # by name: a scanned stack gives biases a second axis


def linear(start: float, end: float, *, steps: int) -> Schedule:
  """start at step 0, end at `steps`, and there ever after."""
  return lambda step: start + (end - start) * jnp.clip(step / steps, 0.0, 1.0)


def cosine(start: float, end: float, *, steps: int) -> Schedule:
  """Half a cosine from start at step 0 to end at `steps`, and there ever after."""
  phase = lambda step: jnp.pi * jnp.clip(step / steps, 0.0, 1.0)
  return lambda step: end + (start - end) * 0.5 * (1 + jnp.cos(phase(step)))


def warmup_cosine(
  start: float, peak: float, final: float, *, warmup: int, steps: int
) -> Schedule:
  """Linear from `start` to `peak` over `warmup` steps, then a cosine to `final` at `steps`.

  Source: facebookresearch/ijepa src/utils/schedulers.py, whose `steps` include the warm-up.
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
  one_of(section.name, ("adamw", "lars"), where="optim.name")
  if warmup > steps:
    raise ValueError(f"optim.warmup is {warmup} steps but the run only {steps}")
  for key in ("lr", "start_lr", "final_lr", "weight_decay", "final_weight_decay", "clip"):
    if not section[key] >= 0:
      raise ValueError(f"optim.{key}={section[key]!r} must not be negative")
  for key in ("b1", "b2"):
    if not 0 <= section[key] < 1:
      raise ValueError(f"optim.{key}={section[key]!r} must lie in [0, 1)")
  # The reference advances its schedulers before the step: update number k uses step k + 1.
  lr = warmup_cosine(section.start_lr, section.lr, section.final_lr, warmup=warmup, steps=steps)
  decay = cosine(section.weight_decay, section.final_weight_decay, steps=steps)
  schedules = {
    "schedule/learning_rate": lambda step: lr(step + 1),
    "schedule/weight_decay": lambda step: decay(step + 1),
  }
  rate = optax.scale_by_learning_rate(schedules["schedule/learning_rate"])
  decoupled = optax.add_decayed_weights(schedules["schedule/weight_decay"], mask=decayed)
  if section.name == "adamw":
    chain = [optax.scale_by_adam(b1=section.b1, b2=section.b2), decoupled, rate]
  else:
    # Not optax.lars, which scales by the learning rate before the momentum.
    trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=1e-3), decayed)
    chain = [decoupled, trust, optax.trace(section.b1), rate]
  if section.clip:
    chain.insert(0, optax.clip_by_global_norm(section.clip))
  return Optimizer(optax.chain(*chain), schedules)
