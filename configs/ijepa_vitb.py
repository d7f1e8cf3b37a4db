"""I-JEPA, ViT-B/16, ImageNet-1k, 600 epochs.

  python -m jepax.main --config=configs/ijepa_vitb.py
  python -m jepax.main --config=configs/ijepa_vitb.py \
    --config.data.source=folder --config.data.path=/data/imagenet

The first reads TFDS's imagenet2012 (prepared once by `tfds build`), the second a folder with
train/CLASS/*.jpeg and val/CLASS/*.jpeg.

Not yet run. The paper's linear probe of the target encoder: 72.9 % top-1 (arXiv 2301.08243,
table 1). The code was released without a config of this size: the predictor is the paper's, the
truncation group that of the released ViT-H/14.
"""

from _imagenet import ijepa


def get_config(arg=""):
  return ijepa(
    arg,
    variant="base",
    patch=16,
    predictor=dict(width=384, depth=6),
    epochs=600,
    truncation_group=128,
    context_keep=72,  # none of 200,000 groups drawn had more
  )
