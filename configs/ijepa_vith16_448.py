"""I-JEPA, ViT-H/16 at 448 pixels, ImageNet-1k, 300 epochs: the paper's best linear probe.

  python -m jepax.main --config=configs/ijepa_vith16_448.py
  python -m jepax.main --config=configs/ijepa_vith16_448.py \
    --config.data.source=folder --config.data.path=/data/imagenet

The first reads TFDS's imagenet2012 (prepared once by `tfds build`), the second a folder with
train/CLASS/*.jpeg and val/CLASS/*.jpeg. --config.mesh.fsdp=8 splits parameters and moments over 8
devices.

Not yet run. The paper's linear probe of the target encoder: 81.1 % top-1 (arXiv 2301.08243,
table 1).
"""

from _imagenet import ijepa


def get_config(arg=""):
  return ijepa(
    arg,
    variant="huge",
    patch=16,
    size=448,
    predictor=dict(width=384, depth=12),
    epochs=300,
    truncation_group=16,
    context_keep=384,  # 53 of 200,000 groups drawn had more
    deep=True,
  )
