"""What all encoders share: how they are applied, trained and, but for ViTs, named.

An encoder is a module images f32[b h w c] -> tokens f32[b p+n d] with `width` d, `patch` (pixels a
side of one of its n tokens), `class_token`, and `prefix` p, the tokens before the patches:
a `ViT`, a `ResNet` or a `ConvNeXt`.

Its weights are one tree: its parameters, and where it has BatchNorm beside them under 'statistics'
the running statistics. So whatever evaluates, hashes or saves weights need not know of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from jepax.models.convnext import VARIANTS as CONVNEXTS
from jepax.models.convnext import convnext
from jepax.models.resnet import VARIANTS as RESNETS
from jepax.models.resnet import resnet

Tree = dict[str, Any]

# Variants that are no ViT's, and what makes them.
CONVOLUTIONAL: dict[str, Callable[..., nn.Module]] = {
  **dict.fromkeys(RESNETS, resnet),
  **dict.fromkeys(CONVNEXTS, convnext),
}
STATISTICS = "statistics"


def init(module: nn.Module, key: jax.Array, images: jax.Array) -> Tree:
  """Weights at random initialisation; running statistics start at mean 0 and variance 1."""
  variables = module.init(key, images)
  if "batch_stats" not in variables:
    return variables["params"]
  return join(variables["params"], variables["batch_stats"])


def join(params: Tree, statistics: Tree) -> Tree:
  """The weights of these parameters and running statistics."""
  return {**params, STATISTICS: statistics}


def split(weights: Tree) -> tuple[Tree, Tree]:
  """The reverse of `join`; statistics are {} where there are none."""
  params = dict(weights)
  return params, params.pop(STATISTICS, {})


def apply(module: nn.Module, weights: Tree, images: jax.Array, **arguments: Any) -> jax.Array:
  """Tokens f32[b p+n d] as in evaluation: no image's depend on another's."""
  params, statistics = split(weights)
  return module.apply({"params": params, "batch_stats": statistics}, images, **arguments)


def train(module: nn.Module, weights: Tree, images: jax.Array) -> tuple[jax.Array, Tree]:
  """Tokens f32[b p+n d] as in training, and the running statistics this batch moved, {} if none."""
  params, statistics = split(weights)
  if not statistics:
    return module.apply({"params": params}, images), {}
  variables = {"params": params, "batch_stats": statistics}
  tokens, moved = module.apply(variables, images, mutable=["batch_stats"])
  return tokens, moved["batch_stats"]
