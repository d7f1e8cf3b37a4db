"""Barlow Twins on the embedded Fashion-MNIST subset, with the quick start's encoder and probes.

python -m jepax.main --config=configs/barlow_twins_fashion_mnist.py

Not yet run to its end: widths, steps and learning rate are those of VICReg's file. Source of the
method: arXiv 2103.03230; there is no published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  return fashion_mnist(
    arg, name="barlow_twins", projector=(256, 256, 256), second=dict(blur=0.1, solarise=0.2)
  )
