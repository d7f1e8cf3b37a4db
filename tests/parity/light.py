"""lightly's losses, importable also where torchvision was built for another torch than there is.

Such a torchvision (a CUDA wheel beside a torch for CPU) can't load its operators, and its import
stops at two of them. Nothing compared here calls an operator, so their names are enough.
"""

from __future__ import annotations

import warnings

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def load():
  """The modules lightly.loss, lightly.loss.swav_loss and lightly.models.modules.heads."""
  try:
    import torchvision  # noqa: F401
  except RuntimeError:
    names = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
      names.define(operator + _SIGNATURE)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its dependencies
    from lightly import loss
    from lightly.loss import swav_loss
    from lightly.models.modules import heads
  return loss, swav_loss, heads
