"""Weights of torchvision's ResNets and ConvNeXts, from their state dicts.

encoder = torchvision.weights(resnet("resnet50"), torch_model.state_dict())
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jepax.convert import rules
from jepax.convert.rules import Rule
from jepax.convert.weights import shapes, unflatten
from jepax.models.convnext import ConvNeXt
from jepax.models.encoder import STATISTICS
from jepax.models.resnet import ResNet

CONV = "o i h w -> h w i o"
HEADS = ("fc.", "classifier.")


def weights(module: ResNet | ConvNeXt, state: Mapping[str, Any]) -> dict[str, Any]:
  """A state dict as the weights of an encoder, see `jepax.models.encoder`.

  The classifier is left out; of a ConvNeXt the norm before it belongs to it.

  Args:
    module: the encoder that the state is of.
    state: name -> tensor or array, as `torchvision.models.*().state_dict()` names them.

  Returns:
    The tree of f32 arrays.

  Raises:
    ValueError: tensors that are missing, left over, or of another shape.
  """
  tensors = {
    name: np.asarray(x, np.float32)
    for name, x in state.items()
    if not name.startswith(HEADS) and not name.endswith("num_batches_tracked")
  }
  table = _resnet(module) if isinstance(module, ResNet) else _convnext(module)
  first = tensors["conv1.weight" if isinstance(module, ResNet) else "features.0.0.weight"]
  wanted = shapes(module, channels=first.shape[1])
  return unflatten(
    rules.read(table, tensors, wanted, where=f"torchvision's {type(module).__name__}")
  )


def _resnet(module: ResNet) -> list[Rule]:
  table = _unit("conv1", "bn1", "conv", "bn")
  for stage, depth in enumerate(module.depths):
    for i in range(depth):
      source, path = f"layer{stage + 1}.{i}.", f"stage{stage}_block{i}/"
      for k in range(1, 4 if module.bottleneck else 3):
        table += _unit(f"{source}conv{k}", f"{source}bn{k}", f"{path}conv{k}", f"{path}bn{k}")
      if not i and (stage or module.bottleneck):
        skip = f"{source}downsample."
        table += _unit(f"{skip}0", f"{skip}1", f"{path}conv_skip", f"{path}bn_skip")
  return table


def _unit(conv: str, norm: str, conv_path: str, norm_path: str) -> list[Rule]:
  """A convolution without bias and its BatchNorm."""
  names = {"weight": "scale", "bias": "bias"}
  moving = {"running_mean": "mean", "running_var": "var"}
  return [
    Rule((f"{conv}.weight",), f"{conv_path}/kernel", CONV),
    *(Rule((f"{norm}.{theirs}",), f"{norm_path}/{ours}") for theirs, ours in names.items()),
    *(
      Rule((f"{norm}.{theirs}",), f"{STATISTICS}/{norm_path}/{ours}")
      for theirs, ours in moving.items()
    ),
  ]


def _convnext(module: ConvNeXt) -> list[Rule]:
  table = []
  for stage, depth in enumerate(module.depths):
    down, norm = ("0", "1") if not stage else ("1", "0")  # the stem is normed after its patches
    table += _conv(f"features.{2 * stage}.{down}", f"stage{stage}_down")
    table += rules.layer_norm(f"features.{2 * stage}.{norm}", f"stage{stage}_norm")
    for i in range(depth):
      source, path = f"features.{2 * stage + 1}.{i}.", f"stage{stage}_block{i}/"
      table += _conv(f"{source}block.0", f"{path}conv")
      table += rules.layer_norm(f"{source}block.2", f"{path}norm")
      table += rules.linear(f"{source}block.3", f"{path}fc1")
      table += rules.linear(f"{source}block.5", f"{path}fc2")
      table.append(Rule((f"{source}layer_scale",), f"{path}scale", "c 1 1 -> c"))
  return table


def _conv(source: str, path: str) -> list[Rule]:
  return [
    Rule((f"{source}.weight",), f"{path}/kernel", CONV),
    Rule((f"{source}.bias",), f"{path}/bias"),
  ]
