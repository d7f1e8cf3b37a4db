"""MAE, ViT-L/16 (or ViT-B/16, ViT-H/14), ImageNet-1k, 800 epochs.

  python -m jepax.main --config=configs/mae_imagenet.py
  python -m jepax.main --config=configs/mae_imagenet.py:variant=huge \
    --config.data.source=folder --config.data.path=/data/imagenet

The first trains ViT-L and reads TFDS's imagenet2012 (prepared once by `tfds build`), the second
ViT-H/14 on a folder with train/CLASS/*.jpeg and val/CLASS/*.jpeg.

Not yet run. The paper fine-tunes ViT-B, L, H to 83.6, 85.9, 86.9 % top-1 and probes them linearly
at 68.0, 75.8, 76.6 % after 1600 epochs (arXiv 2111.06377); after 800, ViT-L is fine-tuned to
85.4 %. Recipe: facebookresearch/mae, PRETRAIN.md.
"""

from _teachers import imagenet, smoke

from jepax.config import parse_arg

PATCH = {"base": 16, "large": 16, "huge": 14}


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False, variant="large")
  if arg.variant not in PATCH:
    raise ValueError(f"variant={arg.variant!r} must be one of {sorted(PATCH)}")
  c = imagenet()
  c.total = "800 epochs"
  c.batch_size = 4096
  c.data.crop_scale = (0.2, 1.0)
  c.method = dict(
    name="mae",
    encoder=dict(variant=arg.variant, patch=PATCH[arg.variant], scan=True, remat="dots"),
    decoder=dict(width=512, depth=8, heads=16),
    mask_ratio=0.75,
    views=dict(flip=0.5),
  )
  c.optim.update(
    lr=1.5e-4 * 4096 / 256,
    final_lr=0.0,
    warmup="40 epochs",
    weight_decay=0.05,
    final_weight_decay=0.05,
    b2=0.95,
  )
  if arg.smoke:
    c.method.decoder.update(width=32, depth=1, heads=2)
    c = smoke(c)
  return c
