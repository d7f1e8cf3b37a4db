"""data2vec 2.0 on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/data2vec2_fashion_mnist.py

Not yet run to its end. After 4 TFLOP on all 60,000 images, three seeds
(`benchmarks/results/compare.md`): 78.0 % k-NN and 82.5 % linear on the test set; the same encoder
at random initialisation 66.0 % and 73.7 %.
"""

from ijepa_fashion_mnist import get_config as ijepa

from jepax.config import parse_arg


def get_config(arg=""):
  c = ijepa(arg)
  c.method = dict(
    name="data2vec2",
    encoder=c.method.encoder,
    decoder=dict(width=64, depth=2, groups=4),
    masks=dict(ratio=0.625, adjust=0.2, copies=4),  # 6 of the 16 patches stay, most in one block
    views=dict(crop_scale=(0.5, 1.0)),
    layers=2,
    momentum=(0.998, 1.0),
    class_weight=0.01,
  )
  c.optim.update(lr=1e-3, b2=0.95, final_lr=0.0, clip=4.0, warmup="15%")
  if parse_arg(arg, smoke=False).smoke:
    c.method.layers = 1
  else:
    c.total = "1500 steps"
  return c
