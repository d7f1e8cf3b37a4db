"""LeJEPA on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/lejepa_fashion_mnist.py

Two global views and two local ones of 14 pixels. Not yet run to its end. After 4 TFLOP on all
60,000 images, three seeds (`benchmarks/results/compare.md`): 73.9 % k-NN and 79.6 % linear on the
test set; the same encoder at random initialisation 66.0 % and 73.7 %. Source of the method: arXiv
2511.08544; there is no published number on these images.
"""

from _two_views import fashion_mnist


def get_config(arg=""):
  return fashion_mnist(
    arg,
    name="lejepa",
    projector=(256, 256, 32),
    slices=256,
    local=dict(crop_scale=(0.1, 0.3), size=14),
    local_views=2,
  )
