"""Schedules, parameter groups, and the optax chain that a config describes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from jepax.names import one_of
from jepax.sharding import is_stacked

Schedule = Callable[[Any], jax.Array]

# By name, since a scanned stack gives biases a second axis. Norms of any kind have these names.
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


def layer_scales(params: Any, *, decay: float, embed: float = 1.0) -> Any:
  """Each leaf's share of the learning rate, decay^(depth + 1 - layer).

  Layers: embeddings and tokens 0, block k is k + 1, norms after the blocks and heads depth + 1.

  Args:
    params: whose part `encoder` is a ViT.
    decay: the factor a layer.
    embed: a further factor of the patch embedding.

  Returns:
    The tree of params, of floats; of arrays [depth 1 ...] for a scanned stack.

  Raises:
    ValueError: a convolutional encoder.

  Source: facebookresearch/mae, util/lr_decay.py; facebookresearch/dinov2, utils/param_groups.py.
  """
  if "transformer" not in params["encoder"]:
    raise ValueError("optim.layer_decay and embed_scale are for transformers; leave them at 1.0")
  blocks = params["encoder"]["transformer"]
  if "blocks" in blocks:
    depth = jax.tree.leaves(blocks)[0].shape[0]
  else:
    depth = 1 + max(int(name.removeprefix("block")) for name in blocks)

  def scale(path, leaf):
    names = [key.key for key in path]
    if names[0] != "encoder" or names[1] == "norm":
      return 1.0
    if names[1] != "transformer":
      return decay ** (depth + 1) * (embed if names[1] == "embed" else 1.0)
    if is_stacked(path):
      return (decay ** (depth - jnp.arange(depth))).reshape(depth, *[1] * (leaf.ndim - 1))
    return decay ** (depth - int(names[2].removeprefix("block")))

  return jax.tree_util.tree_map_with_path(scale, params)


def scale_by_layer(decay: float, *, embed: float = 1.0) -> optax.GradientTransformation:
  """Multiplies every update by its layer's share, see `layer_scales`."""
  return optax.stateless(
    lambda updates, params: jax.tree.map(
      jnp.multiply, updates, layer_scales(params, decay=decay, embed=embed)
    )
  )


def scale_biases(factor: float) -> optax.GradientTransformation:
  """Multiplies the updates of biases and norm scales (Barlow Twins)."""
  return optax.stateless(
    lambda updates, params: jax.tree.map(
      lambda decays, x: x if decays else factor * x, decayed(params), updates
    )
  )


def clip_parts(limit: float) -> optax.GradientTransformation:
  """Clips the global norm of each top-level part of the parameters on its own (DINOv2)."""

  def clip(updates, params):
    del params
    norms = {name: optax.tree.norm(part) for name, part in updates.items()}
    return {
      name: jax.tree.map(lambda x, n=norms[name]: x * (limit / jnp.maximum(n, limit)), part)
      for name, part in updates.items()
    }

  return optax.stateless(clip)


def frozen_until(step: int, *, name: str) -> optax.GradientTransformation:
  """No update, before this step, of parameters that have `name` in their path."""

  def marked(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: any(key.key == name for key in path), params
    )

  return optax.masked(optax.scale_by_schedule(lambda count: jnp.where(count < step, 0, 1)), marked)


def frozen(paths: Iterable[str]) -> optax.GradientTransformation:
  """No update, ever, of the parameters below these paths ('encoder', 'encoder/transformer/block0').

  The last of a chain: weight decay stops there, too.

  Raises:
    ValueError: at the first use, a path that the parameters don't have, or all of them frozen.
  """
  paths = [path for path in (path.strip(" /") for path in paths) if path]

  def below(name, path):
    return f"{name}/".startswith(f"{path}/")

  def check(names):
    for path in paths:
      at = path
      while at and not any(below(name, at) for name in names):
        at = at.rpartition("/")[0]
      if at != path:  # what there is instead, on the level that it leaves the tree at
        depth = 1 + len(at.split("/")) if at else 1
        there = [name for name in names if not at or below(name, at)]
        there = dict.fromkeys("/".join(name.split("/")[:depth]) for name in there)
        one_of(path, there, where="optim.frozen")
    if all(any(below(name, path) for path in paths) for name in names):
      raise ValueError(f"optim.frozen={','.join(paths)!r} leaves no parameter to train")

  def update(updates, params):
    del params
    named = {
      "/".join(key.key for key in path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }
    check(named)
    leaves = [
      jnp.zeros_like(leaf) if any(below(name, path) for path in paths) else leaf
      for name, leaf in named.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(updates), leaves)

  return optax.stateless(update)


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


def build(section: ConfigDict, *, steps: int, warmup: int, freeze: int = 0) -> Optimizer:
  """The optimizer a config's section `optim` describes.

  Args:
    section: see `jepax.config.base`.
    steps: optimizer steps of the run, warm-up included.
    warmup: steps of warm-up.
    freeze: steps in which the prototypes of heads don't move.

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
  # SGD decays all parameters, as torch's does where a recipe hands them over in one group.
  mask = None if section.name == "sgd" else decayed
  weight_decay = optax.add_decayed_weights(schedules["schedule/weight_decay"], mask=mask)
  chain = {
    "adamw": [optax.scale_by_adam(b1=section.b1, b2=section.b2), weight_decay, rate],
    # Not optax.lars, which scales by the learning rate before the momentum.
    "lars": [weight_decay, trust_ratio(), optax.trace(section.b1), rate],
    "sgd": [weight_decay, optax.trace(section.b1), rate],  # decay is part of the gradient
  }[section.name]
  if section.clip_parts and not section.clip:
    raise ValueError("optim.clip_parts needs a limit; set optim.clip, for example to 3.0")
  if section.clip:
    clip = clip_parts if section.clip_parts else optax.clip_by_global_norm
    chain.insert(0, clip(section.clip))
  if section.layer_decay != 1 or section.embed_scale != 1:
    chain.append(scale_by_layer(section.layer_decay, embed=section.embed_scale))
  if section.bias_scale != 1:
    chain.append(scale_biases(section.bias_scale))
  if freeze:
    chain.append(frozen_until(freeze, name="prototypes"))
  if section.frozen:
    chain.append(frozen(section.frozen.split(",")))
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
  one_of(section.name, ("adamw", "lars", "sgd"), where="optim.name")
  if warmup > steps:
    raise ValueError(
      f"optim.warmup={section.warmup!r} is {warmup} steps but the run only {steps}; shorten it or "
      "lengthen total"
    )
  for key in ("lr", "start_lr", "final_lr", "weight_decay", "final_weight_decay", "clip"):
    if not section[key] >= 0:
      raise ValueError(f"optim.{key}={section[key]!r} must not be negative")
  for key in ("layer_decay", "embed_scale", "bias_scale"):
    if not 0 < section[key] <= 1:
      raise ValueError(f"optim.{key}={section[key]!r} must lie in (0, 1]")
  for key in ("b1", "b2"):
    if not 0 <= section[key] < 1:
      raise ValueError(f"optim.{key}={section[key]!r} must lie in [0, 1)")
