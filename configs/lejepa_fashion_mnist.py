"""LeJEPA on the embedded Fashion-MNIST subset, with the quick start's encoder and probes.

python -m jepax.main --config=configs/lejepa_fashion_mnist.py

Two global views and two local ones of 16 pixels. Not yet run to its end: steps and learning rate
are those of VICReg's file. Source of the method: arXiv 2511.08544; there is no published number on
these images.
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
