"""Imagenette at 128 pixels, ResNet-18, two views: the benchmark of lightly.

  python -m jepax.main --config=configs/imagenette_resnet18.py
  python -m jepax.main --config=configs/imagenette_resnet18.py:method=vicreg,epochs=200

The first trains SimCLR; method is one of barlow_twins, byol, simclr, simsiam, vicreg. Reads TFDS's
imagenette/160px-v2, which TFDS downloads by itself.

Not yet run. lightly's k-NN accuracies on the validation split, batch 256 (the best epoch's):

  epochs   barlow_twins    byol   simclr   simsiam   vicreg
  200             0.651   0.705    0.835     0.752    0.763
  800             0.852   0.887    0.889     0.872    0.845

There views are cut from 160 pixels, here from the middle 128; BYOL's target moves before the step;
and VICReg's LARS adapts and decays biases and norms, too. Source: lightly-ai/lightly e8d317f,
docs/source/getting_started/benchmarks/imagenette_benchmark.py.
"""

from _lightly import benchmark
from _two_views import smoke

from jepax.config import parse_arg
from jepax.data import views


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False, method="simclr", batch=256, epochs=800)
  alike = views.simclr(strength=0.5)
  vicreg = dict(alike["views"], saturation=0.2, solarise=0.1)
  three = (2048, 2048, 2048)
  c = benchmark(
    arg.method,
    {
      "barlow_twins": dict(projector=three, off_diagonal=5e-3, **views.byol()),
      "byol": dict(projector=(4096, 256), predictor=4096, momentum=(0.99, 0.99), **views.byol()),
      "simclr": dict(projector=(512, 128), temperature=0.5, **alike),
      "simsiam": dict(projector=three, predictor=512, **views.simsiam()),
      "vicreg": dict(expander=three, views=vicreg),
    },
    encoder=dict(variant="resnet18"),
    lr=0.06 * arg.batch / 256,
    batch=arg.batch,
    epochs=arg.epochs,
    name="imagenette/160px-v2",
    size=128,
  )
  if arg.method == "vicreg":  # which diverges by SGD
    c.optim.update(name="lars", lr=0.3 * arg.batch / 256, weight_decay=1e-4)
    c.optim.update(final_weight_decay=1e-4, warmup=f"{40 if arg.epochs >= 800 else 20} epochs")
  return smoke(c, cell=32) if arg.smoke else c
