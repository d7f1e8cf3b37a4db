"""MoCo v3 on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/moco_v3_fashion_mnist.py

The momentum is lower than the paper's since the run is short. Not yet run to its end. After 4 TFLOP
on all 60,000 images, three seeds (`benchmarks/results/compare.md`): 77.6 % k-NN and 81.2 % linear
on the test set; the same encoder at random initialisation 66.0 % and 73.7 %. Source of the method:
arXiv 2104.02057; there is no published number on these images.
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
