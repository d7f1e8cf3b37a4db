"""I-JEPA, ViT-H/14, ImageNet-1k, 300 epochs: the paper's main model.

  python -m jepax.main --config=configs/ijepa_vith14.py
  python -m jepax.main --config=configs/ijepa_vith14.py \
    --config.data.source=folder --config.data.path=/data/imagenet

The first reads TFDS's imagenet2012 (prepared once by `tfds build`), the second a folder with
train/CLASS/*.jpeg and val/CLASS/*.jpeg. --config.mesh.fsdp=8 splits parameters and moments over 8
devices.

Not yet run. The paper's linear probe of the target encoder: 79.3 % top-1 (arXiv 2301.08243,
table 1), after less than 72 hours on 16 A100.
"""

from _imagenet import ijepa


def get_config(arg=""):
  return ijepa(
    arg,
    variant="huge",
    patch=14,
    predictor=dict(width=384, depth=12),
    epochs=300,
    truncation_group=128,
    context_keep=104,  # none of 200,000 groups drawn had more
    deep=True,
  )
