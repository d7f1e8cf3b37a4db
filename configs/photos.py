"""I-JEPA on a folder of your own photos, a few hundred of them or many: a laptop or one GPU.

python -m jepax.main --config=configs/photos.py --config.data.path=PHOTOS --workdir=runs/photos

ViT-Ti at 96 pixels, patches of 8, batches of 64. Labels, if the folder has sub-folders, are for the
probes alone. On a GPU also set --config.precision=bfloat16; for larger models start from
configs/ijepa_vits.py, whose batch of 2,048 wants ImageNet's size.

`:smoke` runs on the embedded images; on yours with --config.data.source=folder beside the path.

Not yet run to its end: a recipe for few images, whose result depends on them.
"""

from jepax.config import base, parse_arg


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False)
  c = base()
  c.total = "100 epochs"
  c.batch_size = 64
  c.data.update(
    source="folder",
    size=96,
    channels=3,
    crop_scale=(0.3, 1.0),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
  )
  c.method = dict(
    name="ijepa",
    encoder=dict(variant="tiny", patch=8),
    predictor=dict(width=96, depth=4, heads=3),
    masks=dict(target_scale=(0.15, 0.2), context_keep=64),  # of 12 x 12 patches
    views=dict(flip=0.5),
    momentum=(0.996, 1.0),
  )
  c.optim.update(lr=5e-4, final_weight_decay=0.4)
  if arg.smoke:
    c.total = "4 steps"
    c.batch_size = 16
    c.data.source = "embedded"
    c.method.encoder.update(width=32, depth=1, heads=2, mlp_width=64)
    c.method.predictor.update(width=32, depth=1, heads=2)
    c.log.every = "1 steps"
    c.eval.update(every="2 steps", bank=32, queries=32, final_bank=32, final_queries=32)
    c.eval.batch_size = 32
  return c
