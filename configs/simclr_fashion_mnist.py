"""SimCLR on the embedded Fashion-MNIST subset, with the quick start's encoder and probes.

python -m jepax.main --config=configs/simclr_fashion_mnist.py

Not yet run to its end: steps and learning rate are those of VICReg's file. Source of the method:
arXiv 2002.05709; there is no published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  # The temperature is the paper's best for small images (0.5 on CIFAR-10); ImageNet's is 0.1.
  return fashion_mnist(arg, name="simclr", projector=(256, 128), temperature=0.5)
