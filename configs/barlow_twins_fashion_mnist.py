"""Barlow Twins on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/barlow_twins_fashion_mnist.py

Not yet run to its end. After 4 TFLOP on all 60,000 images, three seeds
(`benchmarks/results/compare.md`): 78.1 % k-NN and 81.3 % linear on the test set; the same encoder
at random initialisation 66.0 % and 73.7 %. Source of the method: arXiv 2103.03230; there is no
published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  return fashion_mnist(
    arg, name="barlow_twins", projector=(256, 256, 256), second=dict(blur=0.1, solarise=0.2)
  )
