"""SimCLR, ResNet-50, ImageNet-1k, 1000 epochs.

python -m jepax.main --config=configs/simclr_imagenet.py

Reads TFDS's imagenet2012 (prepared once by `tfds build`); a folder with train/CLASS/*.jpeg and
val/CLASS/*.jpeg by --config.data.source=folder --config.data.path=/data/imagenet.

Not yet run. The paper's linear probe: 69.3 % top-1 (arXiv 2002.05709).
"""

from _two_views import imagenet, smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False)
  c = imagenet(
    name="simclr",
    encoder=dict(variant="resnet50", zero_init=True),
    projector=(2048, 128),
    temperature=0.1,
    **views.simclr(),
  )
  c.total = "1000 epochs"
  c.batch_size = 4096
  c.optim.update(
    name="lars",
    lr=0.3 * 4096 / 256,
    final_lr=0.0,
    warmup="10 epochs",
    weight_decay=1e-6,
    final_weight_decay=1e-6,
  )
  return smoke(c, cell=32) if arg.smoke else c
