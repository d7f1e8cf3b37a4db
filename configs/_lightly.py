"""What the recipes of lightly's benchmarks on small images share; not a config itself.

Source: lightly-ai/lightly e8d317f, docs/source/getting_started/benchmarks.
"""

from _two_views import imagenet

from jepax.names import one_of


def benchmark(method, methods, *, encoder, lr, batch, epochs, blur=True, **data):
  """The recipe of one method; all train by SGD without warm-up, on bilinear crops.

  Args:
    method: its name, a key of `methods`.
    methods: name -> the section `method` but its name and encoder.
    encoder: the section `method.encoder`.
    lr: of all but SimSiam, whose rate does not grow with the batch.
    batch, epochs: images a step, and the length of training.
    blur: whether views are blurred where the method's are.
    **data: keys of the section `data` that differ from ImageNet's.
  """
  one_of(method, methods, where="method")
  c = imagenet(name=method, encoder=encoder, **methods[method])
  c.precision = "float32"
  c.data.update(data)
  c.total = f"{epochs} epochs"
  c.batch_size = batch
  c.method.views.interpolation = "bilinear"
  if not blur:
    for views in ("views", "second"):
      if views in c.method:
        c.method[views].blur = 0.0
  # lightly's loss of BYOL is a quarter of the paper's: a quarter of the rate and four times the
  # decay make the same updates.
  share = 4 if method == "byol" else 1
  decay = 5e-4 * share
  c.optim.update(
    name="sgd",
    lr=(0.06 if method == "simsiam" else lr) / share,
    final_lr=0.0,
    warmup="0 epochs",
    weight_decay=decay,
    final_weight_decay=decay,
  )
  return c
