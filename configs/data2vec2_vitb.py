"""data2vec 2.0, ViT-B/16, ImageNet-1k, 375,300 updates.

  python -m jepax.main --config=configs/data2vec2_vitb.py

Not yet run. The paper fine-tunes this encoder to 84.5 % top-1 (arXiv 2212.07525). Source:
facebookresearch/fairseq, examples/data2vec, config/v2/base_images_only_task.yaml: 16 images on each
of 16 GPUs, 16 masks an image. The paper counts 150 epochs; at 256 images an update these are 75.
"""

from _teachers import imagenet, smoke

from jepax.config import parse_arg


def get_config(arg=""):
  c = imagenet()
  c.total = "375300 steps"
  c.batch_size = 256
  c.data.crop_scale = (0.2, 1.0)
  c.method = dict(
    name="data2vec2",
    encoder=dict(variant="base", patch=16, remat="dots"),
    decoder=dict(width=768, depth=6, kernel=3, groups=16),
    masks=dict(ratio=0.8, adjust=0.07, block=3, copies=16),
    views=dict(flip=0.5),
    layers=10,  # the first two blocks are the reference's modality encoder
    momentum=(0.9998, 0.99999),
    momentum_share=100_000 / 375_300,
    class_weight=2.56,
    noise=0.01,
  )
  c.optim.update(
    lr=1e-3,
    final_lr=0.0,
    warmup="50040 steps",
    weight_decay=0.05,
    final_weight_decay=0.05,
    b2=0.95,
    clip=4.0,
  )
  if parse_arg(arg, smoke=False).smoke:
    c.method.update(layers=2)
    c.method.masks.copies = 2
    c.method.decoder.update(width=32, depth=2, groups=4)
    c = smoke(c)
  return c
