"""VICReg, ResNet-50, ImageNet-1k, 1000 epochs.

python -m jepax.main --config=configs/vicreg_imagenet.py

Reads TFDS's imagenet2012 (prepared once by `tfds build`); a folder with train/CLASS/*.jpeg and
val/CLASS/*.jpeg by --config.data.source=folder --config.data.path=/data/imagenet.

Not yet run. The paper's linear probe: 73.2 % top-1 (arXiv 2105.04906, facebookresearch/vicreg).
"""

from _two_views import imagenet, smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False)
  c = imagenet(
    name="vicreg",
    encoder=dict(variant="resnet50", zero_init=True),
    expander=(8192, 8192, 8192),
    invariance=25.0,
    variance=25.0,
    covariance=1.0,
    **views.byol(),
  )
  c.total = "1000 epochs"
  c.batch_size = 2048
  peak = 0.2 * 2048 / 256
  c.optim.update(
    name="lars",
    lr=peak,
    final_lr=1e-3 * peak,
    warmup="10 epochs",
    weight_decay=1e-6,
    final_weight_decay=1e-6,
  )
  return smoke(c, cell=32) if arg.smoke else c
