"""CIFAR-10, ResNet-18, two views: the benchmark of lightly.

  python -m jepax.main --config=configs/cifar10_resnet18.py
  python -m jepax.main --config=configs/cifar10_resnet18.py:method=byol,batch=128,epochs=200

The first trains SimCLR; method is one of barlow_twins, byol, simclr, simsiam. Reads TFDS's cifar10,
which TFDS downloads by itself. A folder of your own colour images, one sub-folder a class:
--config.data.source=folder --config.data.path=PHOTOS.

Not yet run. lightly's k-NN accuracies on the test set (k = 200, the best epoch's):

  batch, epochs   barlow_twins    byol   simclr   simsiam
  128, 200               0.842   0.869    0.847     0.819
  512, 200               0.819   0.868    0.848     0.764
  512, 800               0.859   0.910    0.879     0.904

There SimSiam's projector ends in a norm with scale and shift, and BYOL's target moves before the
step. Source: lightly-ai/lightly e8d317f, docs/source/getting_started/benchmarks.rst.
"""

from _lightly import benchmark
from _two_views import smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False, method="simclr", batch=512, epochs=800)
  c = benchmark(
    arg.method,
    {
      "barlow_twins": dict(projector=(2048, 2048), off_diagonal=5e-3, **views.byol()),
      "byol": dict(projector=(1024, 256), predictor=1024, momentum=(0.99, 0.99), **views.byol()),
      "simclr": dict(projector=(512, 128), temperature=0.5, **views.simclr(strength=0.5)),
      "simsiam": dict(projector=(2048, 2048), predictor=512, **views.simsiam()),
    },
    encoder=dict(variant="resnet18", stem="cifar"),
    lr=0.06 * arg.batch / 128,
    batch=arg.batch,
    epochs=arg.epochs,
    blur=False,
    name="cifar10",
    eval_split="test",
    size=32,
  )
  return smoke(c, cell=8) if arg.smoke else c
