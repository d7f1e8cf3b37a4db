"""SimSiam, ResNet-50, ImageNet-1k, 100 epochs.

python -m jepax.main --config=configs/simsiam_imagenet.py

Reads TFDS's imagenet2012 (prepared once by `tfds build`); a folder with train/CLASS/*.jpeg and
val/CLASS/*.jpeg by --config.data.source=folder --config.data.path=/data/imagenet.

Not yet run. The paper's linear probe: 68.1 % top-1 (arXiv 2011.10566, facebookresearch/simsiam).
"""

from _two_views import imagenet, smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False)
  c = imagenet(
    name="simsiam",
    encoder=dict(variant="resnet50", zero_init=True),
    projector=(2048, 2048, 2048),
    predictor=512,
    **views.simsiam(),
  )
  c.total = "100 epochs"
  c.batch_size = 512
  c.optim.update(
    name="sgd",
    lr=0.05 * 512 / 256,
    final_lr=0.0,
    warmup="0 epochs",
    weight_decay=1e-4,
    final_weight_decay=1e-4,
    unscheduled="predictor",
  )
  return smoke(c, cell=32) if arg.smoke else c
