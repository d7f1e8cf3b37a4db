"""LeJEPA, ViT-L/14, ImageNet-1k, 100 epochs.

  python -m jepax.main --config=configs/lejepa_imagenet.py
  python -m jepax.main --config=configs/lejepa_imagenet.py \
    --config.data.source=folder --config.data.path=/data/imagenet

The first reads TFDS's imagenet2012 (prepared once by `tfds build`), the second a folder with
train/CLASS/*.jpeg and val/CLASS/*.jpeg.

Not yet run. The paper's ablations of this model lie at 73.6 to 75.5 % linear top-1, its best run
at 77.1 % (arXiv 2511.08544); their training script is unpublished and did more than the paper says.
docs/methods/lejepa.md lists what differs here.
"""

from _two_views import imagenet, smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  c = imagenet(
    name="lejepa",
    encoder=dict(variant="large", patch=14, class_token=True, scan=True, remat="dots"),
    projector=(2048, 2048, 512),
    global_views=2,
    local_views=6,
    convention="paper",
    weight=0.05,
    slices=1024,
    t_max=5.0,
    nodes=9,  # 17 on both sides of zero
    **views.lejepa(local_size=98),
  )
  c.total = "100 epochs"
  c.batch_size = 512
  c.optim.update(
    lr=5e-4,
    final_lr=5e-7,
    warmup="10 epochs",  # the paper says linear and no more
    weight_decay=0.05,
    final_weight_decay=0.05,
  )
  return smoke(c) if parse_arg(arg, smoke=False).smoke else c
