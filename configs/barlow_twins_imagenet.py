"""Barlow Twins, ResNet-50, ImageNet-1k, 1000 epochs.

python -m jepax.main --config=configs/barlow_twins_imagenet.py

Reads TFDS's imagenet2012 (prepared once by `tfds build`); a folder with train/CLASS/*.jpeg and
val/CLASS/*.jpeg by --config.data.source=folder --config.data.path=/data/imagenet.

Not yet run. The reference's linear probe: 73.5 % top-1, after seven days on 16 V100
(facebookresearch/barlowtwins; arXiv 2103.03230 says 73.2 %).
"""

from _two_views import imagenet, smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False)
  c = imagenet(
    name="barlow_twins",
    encoder=dict(variant="resnet50", zero_init=True),
    projector=(8192, 8192, 8192),
    off_diagonal=0.0051,
    **views.byol(),
  )
  c.total = "1000 epochs"
  c.batch_size = 2048
  peak = 0.2 * 2048 / 256
  c.optim.update(
    name="lars",
    lr=peak,
    final_lr=1e-3 * peak,
    # 0.0048 in the reference, whose gradients are divided by its 16 GPUs: LARS does not notice.
    bias_scale=0.0048 / 16 / 0.2,
    warmup="10 epochs",
    weight_decay=1e-6,
    final_weight_decay=1e-6,
  )
  return smoke(c, cell=32) if arg.smoke else c
