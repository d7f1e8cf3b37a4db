"""MoCo v3, ViT-S/16 or ViT-B/16, ImageNet-1k, 300 epochs.

  python -m jepax.main --config=configs/moco_v3_imagenet.py
  python -m jepax.main --config=configs/moco_v3_imagenet.py:variant=base \
    --config.data.source=folder --config.data.path=/data/imagenet

The first trains ViT-S and reads TFDS's imagenet2012 (prepared once by `tfds build`), the second
ViT-B on a folder with train/CLASS/*.jpeg and val/CLASS/*.jpeg.

Not yet run. The paper's linear probes of the class token: ViT-S 73.2 %, ViT-B 76.7 % top-1;
fine-tuned 81.4 % and 83.2 % (arXiv 2104.02057). docs/methods/moco_v3.md lists what differs here.
"""

from _two_views import imagenet, smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False, variant="small")
  c = imagenet(
    name="moco_v3",
    # 12 heads in both: the paper's ViT-S has twice as many as others'.
    encoder=dict(variant=arg.variant, patch=16, heads=12, class_token=True, init_name="xavier"),
    projector=(4096, 4096, 256),
    predictor=4096,
    temperature=0.2,
    momentum=(0.99, 1.0),
    frozen_patches=True,
    **views.byol(),
  )
  c.method.encoder.update(scan=True, remat="dots")
  c.total = "300 epochs"
  c.batch_size = 4096
  c.optim.update(
    lr=1.5e-4 * 4096 / 256,
    final_lr=0.0,
    warmup="40 epochs",
    weight_decay=0.1,
    final_weight_decay=0.1,
  )
  return smoke(c) if arg.smoke else c
