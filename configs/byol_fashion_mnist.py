"""BYOL on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/byol_fashion_mnist.py

The momentum is lower than the paper's since the run is short. Not yet run to its end. After 2
TFLOP, three seeds on two cores (`benchmarks/results/compare.md`): 65.3 % k-NN and 74.6 % linear;
the same encoder at random initialisation 63.9 % and 71.7 %. Source of the method: arXiv
2006.07733; there is no published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  return fashion_mnist(
    arg,
    name="byol",
    projector=(256, 128),
    predictor=256,
    momentum=(0.98, 1.0),
    second=dict(blur=0.1, solarise=0.2),
  )
