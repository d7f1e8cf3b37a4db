"""SimSiam on the embedded Fashion-MNIST subset, with the quick start's encoder and probes.

python -m jepax.main --config=configs/simsiam_fashion_mnist.py

Not yet run to its end: steps and learning rate are those of VICReg's file. Source of the method:
arXiv 2011.10566; there is no published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  c = fashion_mnist(arg, name="simsiam", projector=(256, 256, 256), predictor=64)
  c.optim.unscheduled = "predictor"
  return c
