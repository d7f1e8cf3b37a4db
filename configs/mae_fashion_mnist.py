"""MAE on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/mae_fashion_mnist.py

Not yet run to its end. After 4 TFLOP on all 60,000 images, three seeds
(`benchmarks/results/compare.md`): 79.7 % k-NN and 82.2 % linear on the test set; the same encoder
at random initialisation 66.0 % and 73.7 %.
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
