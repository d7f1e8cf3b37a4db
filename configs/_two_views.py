"""What the recipes of the methods with two views share; not a config itself."""

from ijepa_fashion_mnist import get_config as ijepa

from jepax.config import base, parse_arg


def fashion_mnist(arg, **method):
  """Data, encoder and probes of ijepa_fashion_mnist.py, and VICReg's views and schedule.

  Args:
    arg: what follows the colon of --config: '' or 'smoke'.
    **method: the section `method` but its encoder and views.
  """
  c = ijepa(arg)
  views = dict(crop_scale=(0.3, 1.0), flip=0.5, brightness=0.4, contrast=0.4)
  c.method = dict(encoder=c.method.encoder, views=views, **method)
  c.optim.update(lr=1e-3, weight_decay=0.05, final_weight_decay=0.05)
  if not parse_arg(arg, smoke=False).smoke:
    c.total = "500 steps"
    c.batch_size = 128
  return c


def imagenet(**method):
  """ImageNet-1k in TFDS with two views; the caller sets total, batch_size and optim.

  The host decodes and takes the centre square; all views are cut from it on the device.

  Args:
    **method: the section `method`.
  """
  c = base()
  c.precision = "bfloat16"
  c.data.update(
    source="tfds",
    name="imagenet2012",
    eval_split="validation",
    size=224,
    channels=3,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    threads=32,
    prefetch=32,
  )
  c.method = method
  c.checkpoint.every = "1000 steps"
  c.log.every = "50 steps"
  c.eval.update(
    every="5%",
    bank=10_000,
    queries=5_000,
    final_bank=50_000,
    final_queries=10_000,
  )
  return c


def smoke(c, *, cell=None):
  """A form of seconds on a CPU, offline, on the recipe's own grid of patches.

  Args:
    c: the recipe.
    cell: pixels a side of a cell of the last map, for a ResNet.
  """
  grid = c.data.size // (cell or c.method.encoder.patch)
  c.total = "4 steps"
  c.batch_size = 16
  c.data.update(source="embedded", train_split="train", eval_split="test", size=2 * grid, threads=2)
  if cell:
    c.method.encoder.update(stem="cifar", width=16, depths=(1, 1))
  else:
    c.method.encoder.update(patch=2, width=32, depth=2, heads=2, mlp_width=64)
  c.method["expander" if "expander" in c.method else "projector"] = (32, 32)
  if "predictor" in c.method:
    c.method.predictor = 32
  if "local" in c.method:
    c.method.local.size = 2 * (grid // 2)
  if "slices" in c.method:
    c.method.slices = 16
  c.optim.warmup = "1 steps"
  c.checkpoint.every = "2 steps"
  c.log.every = "1 steps"
  c.eval.update(every="2 steps", bank=32, queries=32, final_bank=32, final_queries=32)
  c.eval.batch_size = 32
  return c
