"""I-JEPA, the image preset of `JEPA`: ViT, multi-block masks, linear EMA, smooth-L1.

Source: arXiv 2301.08243; facebookresearch/ijepa 52c1ae9. Deviations between paper and code are
resolved in favour of the code, which made the released weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jepax import regularisers
from jepax.config import Run
from jepax.construct import construct
from jepax.data.augment import Augment
from jepax.methods.jepa import JEPA
from jepax.methods.masking import build_sampler, build_vit, samplers
from jepax.models.predictor import Predictor
from jepax.optim import linear

# Sections whose `name` decides which other keys they take.
CHOICES = {"masks": samplers, "regulariser": lambda: regularisers.REGULARISERS}


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  predictor: Mapping[str, Any],
  masks: Mapping[str, Any],
  views: Mapping[str, Any],
  momentum: tuple[float, float] = (0.996, 1.0),
  objective: str = "smooth_l1",
  target_norm: str = "layer_norm",
  regulariser: Mapping[str, Any] | None = None,
  contrast: Mapping[str, Any] | None = None,
) -> JEPA:
  """I-JEPA for a run.

  Args:
    run: image size, channels, normalisation, steps and compute dtype.
    encoder: arguments of `models.vit.vit`: variant, patch, ...
    predictor: fields of `models.predictor.Predictor`; heads default to the encoder's, as in the
      reference (a head is then 24 or 32 wide, not 64).
    masks: name, a file of jepax/masks ('multiblock', 'random', ...), and fields of the sampler in
      it but the grid; without a name those of `masks.multiblock.MultiBlock`.
    views: fields of `data.augment.Augment` but mean and std.
    momentum: of the target at the first and the last step, linear between.
    objective: 'smooth_l1' (code) or 'mse' (paper).
    target_norm: of the targets, 'layer_norm' (code), 'instance_norm' (data2vec's) or 'none'.
    regulariser: name ('vicreg', 'sigreg'), weight and other fields of one in `jepax.regularisers`,
      against collapse; None for none, as in the paper.
    contrast: weight and temperature of `regularisers.Contrast`, InfoNCE of pooled predictions; None
      for none, as in the paper.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  # Patch tokens alone: masks, predictor and pooling count no others.
  patches_only = dict(class_token=False, registers=0, mask_token=False, drop_path=0.0)
  network = build_vit(run, encoder, **patches_only)
  grid = run.grid(network.patch)
  if not 0 <= momentum[0] <= momentum[1] <= 1:
    raise ValueError(f"method.momentum={momentum} must be (first, last), 0 <= first <= last <= 1")
  return JEPA(
    encoder=network,
    predictor=construct(
      Predictor,
      {"heads": network.heads, **predictor},
      where="method.predictor",
      dtype=run.dtype,
      drop_path=0.0,
    ),
    masks=build_sampler(masks, grid=grid, default="multiblock"),
    views=construct(Augment, views, where="method.views", mean=run.mean, std=run.std),
    momentum=linear(*momentum, steps=run.steps),
    grid=grid,
    objective=objective,
    target_norm=target_norm,
    regulariser=None
    if regulariser is None
    else regularisers.build(regulariser, where="method.regulariser"),
    contrast=None
    if contrast is None
    else construct(regularisers.Contrast, contrast, where="method.contrast"),
  )
