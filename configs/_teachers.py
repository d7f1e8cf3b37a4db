"""What the ImageNet recipes of data2vec 2.0 and DINOv2 share; not a config itself."""

from jepax.config import base


def imagenet():
  """ImageNet-1k from TFDS at 224 pixels, in bfloat16; no method yet."""
  c = base()
  c.precision = "bfloat16"
  c.data.update(
    source="tfds",
    name="imagenet2012",
    eval_split="validation",
    size=224,
    channels=3,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    threads=32,
    prefetch=32,
  )
  c.checkpoint.every = "1000 steps"
  c.log.every = "50 steps"
  c.eval.update(
    every="5%", bank=10_000, queries=5_000, final_bank=50_000, final_queries=10_000, batch_size=256
  )
  return c


def smoke(c):
  """Seconds on a CPU, offline, on the recipe's own grid of patches: the masks are the real ones."""
  grid = c.data.size // c.method.encoder.patch
  c.total = "4 steps"
  c.batch_size = 16
  c.data.update(source="embedded", train_split="train", eval_split="test", size=2 * grid, threads=2)
  c.method.encoder.update(patch=2, width=32, depth=2, heads=2, mlp_width=64)
  c.optim.warmup = "1 steps"
  c.checkpoint.every = "2 steps"
  c.log.every = "1 steps"
  c.eval.update(every="2 steps", bank=32, queries=32, final_bank=32, final_queries=32)
  c.eval.batch_size = 32
  return c
