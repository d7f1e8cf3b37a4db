"""Barlow Twins on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/barlow_twins_fashion_mnist.py

Not yet run to its end. After 2 TFLOP, three seeds on two cores (`benchmarks/results/compare.md`):
73.4 % k-NN and 78.5 % linear; the same encoder at random initialisation 63.9 % and 71.7 %. Source
of the method: arXiv 2103.03230; there is no published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  return fashion_mnist(
    arg, name="barlow_twins", projector=(256, 256, 256), second=dict(blur=0.1, solarise=0.2)
  )
