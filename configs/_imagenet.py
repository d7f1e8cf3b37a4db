"""What the I-JEPA recipes share; not a config itself.

Source: facebookresearch/ijepa 52c1ae9, configs/*.yaml, and arXiv 2301.08243, appendix A.
"""

from jepax.config import base, parse_arg


def ijepa(
  arg,
  *,
  variant,
  patch,
  predictor,
  epochs,
  truncation_group,
  context_keep,
  size=224,
  warmup_epochs=40,
  deep=False,
  data=None,
):
  """The recipe of the released code.

  Args:
    arg: what follows the colon of --config: '' or 'smoke'.
    variant, patch: of the encoder.
    predictor: its width and depth; its heads are as many as the encoder's.
    epochs: length of training.
    truncation_group: images a GPU in the reference, whose contexts are cut to one length.
    context_keep: slots of a context.
    size: pixels.
    warmup_epochs: of the learning rate.
    deep: scan over the blocks and recompute all but matrix products in the backward pass.
    data: keys of the section `data` that differ from ImageNet-1k in TFDS.
  """
  arg = parse_arg(arg, smoke=False)
  layers = dict(scan=True, remat="dots") if deep else {}
  c = base()
  c.total = f"{epochs} epochs"
  c.batch_size = 2048
  c.precision = "bfloat16"
  c.data.update(
    source="tfds",
    name="imagenet2012",
    eval_split="validation",
    size=size,
    channels=3,
    crop_scale=(0.3, 1.0),  # the only augmentation: no flip, no colour
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    threads=32,
    prefetch=32,
  )
  c.data.update(data or {})
  c.method = dict(
    name="ijepa",
    encoder=dict(variant=variant, patch=patch, **layers),
    predictor=dict(**predictor, **layers),
    masks=dict(
      compat="ijepa",
      targets=4,
      target_scale=(0.15, 0.2),
      target_aspect=(0.75, 1.5),
      context_scale=(0.85, 1.0),
      min_keep=10,
      truncation_group=truncation_group,
      context_keep=context_keep,
    ),
    views=dict(),
    momentum=(0.996, 1.0),
  )
  c.optim.update(
    lr=1e-3,
    start_lr=2e-4,
    final_lr=1e-6,
    warmup=f"{warmup_epochs} epochs",
    weight_decay=0.04,
    final_weight_decay=0.4,
  )
  c.checkpoint.every = "1000 steps"
  c.log.every = "50 steps"
  share = (224 / size) ** 2  # the probes' images are held in memory: 60,000 of 224x224 are 9 GB
  c.eval.update(
    every="5%",
    bank=int(10_000 * share),
    queries=int(5_000 * share),
    final_bank=int(50_000 * share),
    final_queries=int(10_000 * share),
    batch_size=int(256 * share),
  )
  return _smoke(c) if arg.smoke else c


def _smoke(c):
  """Seconds on a CPU, offline, on the recipe's own grid of patches: the masks are the real ones."""
  grid = c.data.size // c.method.encoder.patch
  c.total = "4 steps"
  c.batch_size = 16
  c.data.update(source="embedded", train_split="train", eval_split="test", size=2 * grid, threads=2)
  c.method.encoder.update(patch=2, width=32, depth=2, heads=2, mlp_width=64)
  c.method.predictor.update(width=32, depth=2)
  c.optim.warmup = "1 steps"
  c.checkpoint.every = "2 steps"
  c.log.every = "1 steps"
  c.eval.update(every="2 steps", bank=32, queries=32, final_bank=32, final_queries=32)
  c.eval.batch_size = 32
  return c
