"""I-JEPA on the embedded Fashion-MNIST subset: 10,000 images, no labels, a laptop's CPU.

  python -m jepax.main --config=configs/quickstart.py
"""

from jepax.config import base, parse_arg


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False)
  c = base()
  c.total = "700 steps"
  c.batch_size = 128
  c.data.name = "fashion_mnist"  # what --config.data.source=tfds reads instead
  c.method = dict(
    name="ijepa",
    encoder=dict(
      variant="tiny", patch=4, width=96, depth=4, heads=3, mlp_width=384, activation="gelu_tanh"
    ),
    predictor=dict(width=64, depth=2, heads=2, activation="gelu_tanh"),
    masks=dict(target_scale=(0.15, 0.25), min_keep=1, context_keep=16),
    views=dict(),
    momentum=(0.99, 1.0),
  )
  c.optim.lr = 2e-3
  c.optim.warmup = "10%"
  c.checkpoint.every = "25%"
  c.eval.every = "20%"
  if arg.smoke:
    c.total = "4 steps"
    c.batch_size = 16
    c.method.encoder.update(width=32, depth=1, heads=2, mlp_width=64)
    c.method.predictor.update(width=32, depth=1)
    c.log.every = "1 steps"
    c.eval.update(every="2 steps", bank=200, queries=100, final_bank=200, final_queries=100)
  return c
