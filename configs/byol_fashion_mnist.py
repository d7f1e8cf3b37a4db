"""BYOL on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/byol_fashion_mnist.py

The momentum is lower than the paper's since the run is short. Not yet run to its end. After 4 TFLOP
on all 60,000 images, three seeds (`benchmarks/results/compare.md`): 72.3 % k-NN and 79.4 % linear
on the test set; the same encoder at random initialisation 66.0 % and 73.7 %. Source of the method:
arXiv 2006.07733; there is no published number on these images.
"""

from _two_views import fashion_mnist

from jepax.config import parse_arg


def get_config(arg=""):
  c = fashion_mnist(
    arg, name="byol", projector=(256, 128), predictor=256, momentum=(0.97, 1.0), second=dict()
  )
  if not parse_arg(arg, smoke=False).smoke:
    c.total = "1000 steps"
    c.batch_size = 64
  return c
