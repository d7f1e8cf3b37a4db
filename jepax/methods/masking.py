"""What the methods that hide tokens share: their encoder is a transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jepax.config import Run
from jepax.construct import construct
from jepax.models.encoder import CONVOLUTIONAL
from jepax.models.vit import VARIANTS, ViT, vit


def build_vit(run: Run, encoder: Mapping[str, Any], **fixed: Any) -> ViT:
  """The encoder of a config's section `method.encoder`, arguments of `models.vit.vit`.

  Args:
    run: compute dtype.
    encoder: the section.
    **fixed: fields that the method decides.

  Raises:
    ValueError: a convolutional encoder, or anything `construct` refuses.
  """
  if "variant" in encoder and encoder["variant"] in CONVOLUTIONAL:
    raise ValueError(
      f"method.encoder.variant={encoder['variant']!r} is convolutional, and this method hides "
      f"tokens from its encoder: use a ViT, one of {list(VARIANTS)}, or a method that compares "
      "whole views, such as simclr"
    )
  return construct(vit, encoder, where="method.encoder", dtype=run.dtype, **fixed)
