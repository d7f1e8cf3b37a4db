"""I-JEPA, ViT-Ti/16, ImageNet-1k: small enough to try ideas on.

  python -m jepax.main --config=configs/ijepa_vitti.py
  python -m jepax.main --config=configs/ijepa_vitti.py \
    --config.data.source=folder --config.data.path=/data/imagenet

The first reads TFDS's imagenet2012 (prepared once by `tfds build`), the second a folder with
train/CLASS/*.jpeg and val/CLASS/*.jpeg.

Not yet run. The paper has no model of this size: the predictor keeps the proportions of the base
model's (half the encoder's width, heads of 32, 6 blocks), the rest is the common recipe.
"""

from _imagenet import ijepa


def get_config(arg=""):
  return ijepa(
    arg,
    variant="tiny",
    patch=16,
    predictor=dict(width=96, depth=6),
    epochs=300,
    truncation_group=128,
    context_keep=72,  # none of 200,000 groups drawn had more
  )
