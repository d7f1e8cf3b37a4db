"""MAE on the embedded Fashion-MNIST subset, with the encoder and the probes of the quick start.

python -m jepax.main --config=configs/mae_fashion_mnist.py

12 TFLOP of training, against the quick start's 14. Not yet run to its end: `benchmarks/study.py`
compares the methods at equal compute.
"""

from ijepa_fashion_mnist import get_config as ijepa

from jepax.config import parse_arg


def get_config(arg=""):
  c = ijepa(arg)
  c.method = dict(
    name="mae",
    encoder=c.method.encoder,
    decoder=dict(width=64, depth=2, heads=2, activation="gelu_tanh"),
    mask_ratio=0.75,
    views=dict(crop_scale=(0.5, 1.0)),
  )
  c.optim.update(lr=2e-3, b2=0.95, weight_decay=0.05, final_weight_decay=0.05)
  if not parse_arg(arg, smoke=False).smoke:
    c.total = "1500 steps"
    c.batch_size = 128
  return c
