"""DINOv2 on the embedded Fashion-MNIST subset, with ijepa_fashion_mnist.py's encoder.

python -m jepax.main --config=configs/dinov2_fashion_mnist.py

Not yet run to its end. After 4 TFLOP on all 60,000 images, three seeds
(`benchmarks/results/compare.md`): 74.1 % k-NN and 75.5 % linear on the test set; the same encoder
at random initialisation 66.0 % and 73.7 %.
"""

from ijepa_fashion_mnist import get_config as ijepa

from jepax.config import parse_arg


def get_config(arg=""):
  c = ijepa(arg)
  crops = dict(flip=0.5, brightness=0.4, contrast=0.4)
  c.method = dict(
    name="dinov2",
    encoder=c.method.encoder,
    head=dict(prototypes=1024, hidden=256, bottleneck=64),
    views=dict(crop_scale=(0.4, 1.0), **crops),
    local=dict(crop_scale=(0.1, 0.4), size=14, **crops),
    local_views=4,
    masks=dict(smallest=1),
    momentum=(0.99, 1.0),
    centering="sinkhorn",  # from the first step on, where a moving center needs hundreds
  )
  c.optim.update(
    lr=1e-3, weight_decay=0.04, final_weight_decay=0.4, clip=3.0, clip_parts=True, freeze="1%"
  )
  if parse_arg(arg, smoke=False).smoke:
    c.method.head.update(prototypes=32, hidden=32, bottleneck=8)
    c.method.local_views = 1
  else:
    c.total = "400 steps"
    c.batch_size = 64
  return c
