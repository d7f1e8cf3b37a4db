"""BYOL, ResNet-50, ImageNet-1k, 1000 epochs.

python -m jepax.main --config=configs/byol_imagenet.py

Reads TFDS's imagenet2012 (prepared once by `tfds build`); a folder with train/CLASS/*.jpeg and
val/CLASS/*.jpeg by --config.data.source=folder --config.data.path=/data/imagenet.

Not yet run. The paper's linear probe of the online encoder: 74.3 % top-1 (arXiv 2006.07733).
"""

from _two_views import imagenet, smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False)
  c = imagenet(
    name="byol",
    encoder=dict(variant="resnet50", zero_init=True),
    projector=(4096, 256),
    predictor=4096,
    momentum=(0.996, 1.0),
    **views.byol(),
  )
  c.total = "1000 epochs"
  c.batch_size = 4096
  c.optim.update(
    name="lars",
    lr=0.2 * 4096 / 256,
    final_lr=0.0,
    warmup="10 epochs",
    weight_decay=1.5e-6,
    final_weight_decay=1.5e-6,
  )
  return smoke(c, cell=32) if arg.smoke else c
