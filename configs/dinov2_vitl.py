"""DINOv2, ViT-L/16, ImageNet-1k, 125,000 updates of 2048 images: the short recipe.

  python -m jepax.main --config=configs/dinov2_vitl.py

Not yet run. The reference reaches 81.6 % k-NN and 82.9 % linear in one day on 32 A100s. Source:
facebookresearch/dinov2, configs/train/vitl16_short.yaml and its README. An epoch of the reference
is 1250 updates. Crops are cut from images of 224 pixels, there from the files' full size.
"""

from _teachers import imagenet, smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  c = imagenet()
  c.total = "125000 steps"
  c.batch_size = 2048
  c.data.crop_scale = (1.0, 1.0)  # the device cuts the crops
  c.method = dict(
    name="dinov2",
    encoder=dict(
      variant="large",
      patch=16,
      layer_scale=1e-5,
      drop_path=0.3,
      drop_path_shape="uniform",
      scan=True,
      remat="dots",
    ),
    head=dict(prototypes=65536, hidden=2048, bottleneck=256),  # shared with the patches
    **views.dino(),
    local_views=8,
    masks=dict(share=0.5, ratio=(0.1, 0.5)),
    momentum=(0.992, 1.0),
    temperature=(0.04, 0.07),
    temperature_share=0.3,
    centering="softmax",
    koleo_weight=0.1,
    koleo_group=64,  # images a GPU in the reference
  )
  c.optim.update(
    lr=4e-3 * (2048 / 1024) ** 0.5,
    final_lr=1e-6,
    warmup="12500 steps",
    weight_decay=0.04,
    final_weight_decay=0.4,
    clip=3.0,
    clip_parts=True,
    layer_decay=0.9,
    embed_scale=0.2,
    freeze="1250 steps",
  )
  if parse_arg(arg, smoke=False).smoke:
    c.method.head.update(prototypes=32, hidden=32, bottleneck=8)
    c.method.local.size = 12
    c.method.update(local_views=1, koleo_group=None)
    c.optim.freeze = "1 steps"
    c = smoke(c)
  return c
