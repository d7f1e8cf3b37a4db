"""MoCo v3 on the embedded Fashion-MNIST subset, with the quick start's encoder and probes.

python -m jepax.main --config=configs/moco_v3_fashion_mnist.py

Not yet run to its end: steps and learning rate are those of VICReg's file, the momentum is lower
than the paper's since the run is short. The encoder is pooled by its mean, as all methods' here.
Source of the method: arXiv 2104.02057; there is no published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  return fashion_mnist(
    arg,
    name="moco_v3",
    projector=(256, 256, 128),
    predictor=256,
    momentum=(0.98, 1.0),
    second=dict(blur=0.1, solarise=0.2),
  )
