"""lightly and torchvision, importable also where the latter was built for another torch.

Such a torchvision (a CUDA wheel beside a torch for CPU) can't load its operators, and its import
stops at two of them. Nothing compared here calls an operator, so their names are enough.
"""

from __future__ import annotations

import warnings

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def vision():
  """The module torchvision."""
  try:
    import torchvision
  except RuntimeError:
    names = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
      names.define(operator + _SIGNATURE)
    import torchvision
  return torchvision


def load():
  """The modules lightly.loss, lightly.loss.swav_loss and lightly.models.modules.heads."""
  vision()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its dependencies
    from lightly import loss
    from lightly.loss import swav_loss
    from lightly.models.modules import heads
  return loss, swav_loss, heads
