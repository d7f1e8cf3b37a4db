"""The smallest run of every method, shared by the tests: one compiled shape each."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jepax import config as config_lib
from jepax.data.build import Data
from jepax.experiment import Experiment, prepare

SIZE, BATCH = 16, 16  # 4 x 4 patches of 4 pixels

ENCODER = dict(variant="tiny", patch=4, width=32, depth=1, heads=2, mlp_width=32)
VIEWS = dict(crop_scale=(0.5, 1.0), flip=0.5, contrast=0.2)
METHODS = {
  "barlow_twins": dict(encoder=ENCODER, projector=(32, 16), views=VIEWS, second=dict(blur=0.5)),
  "byol": dict(encoder=ENCODER, projector=(32, 16), predictor=32, views=VIEWS),
  "data2vec2": dict(
    encoder=ENCODER,
    decoder=dict(width=32, depth=1, groups=2),
    masks=dict(ratio=0.6, copies=2),
    views=dict(),
    layers=1,
    momentum=(0.9, 1.0),
    class_weight=0.5,
  ),
  "dinov2": dict(
    encoder=dict(**ENCODER, registers=2),
    head=dict(prototypes=24, hidden=32, bottleneck=8),
    ibot_head=dict(prototypes=16),
    views=dict(crop_scale=(0.5, 1.0), flip=0.5),
    local=dict(crop_scale=(0.2, 0.5), size=8),
    local_views=1,
    masks=dict(ratio=(0.2, 0.5)),
    momentum=(0.9, 1.0),
    centering="sinkhorn",
  ),
  "ijepa": dict(
    encoder=ENCODER,
    predictor=dict(width=16, depth=1),
    masks=dict(target_scale=(0.1, 0.25), targets=2, min_keep=2, context_keep=8),
    views=dict(),
    momentum=(0.9, 1.0),
  ),
  "lejepa": dict(
    encoder=ENCODER,
    projector=(32, 8),
    slices=16,
    views=VIEWS,
    local=dict(size=8, crop_scale=(0.2, 0.5)),
    local_views=1,
  ),
  "mae": dict(encoder=ENCODER, decoder=dict(width=16, depth=1, heads=2), views=dict()),
  # Without a class token, which at the start hardly differs from image to image: batch norm would
  # raise rounding with the rest of it, here by 100,000.
  "moco_v3": dict(
    encoder=ENCODER,
    projector=(32, 32),
    predictor=32,
    temperature=0.1,
    views=VIEWS,
  ),
  "simclr": dict(encoder=ENCODER, projector=(32, 16), views=VIEWS),
  "simsiam": dict(encoder=ENCODER, projector=(32, 16), predictor=8, views=VIEWS),
  "vicreg": dict(encoder=ENCODER, expander=(32, 16), views=VIEWS),
}


def images(count: int, *, seed: int = 0) -> np.ndarray:
  """Bright bars on noise, u8[count h w 1]: four kinds, told apart by place and direction."""
  rng = np.random.default_rng(seed)
  x = rng.integers(0, 60, (count, SIZE, SIZE, 1), dtype=np.uint8)
  for i, kind in enumerate(labels(count)):
    line = slice(2, 6) if kind % 2 else slice(10, 14)
    x[i, line if kind < 2 else slice(None), line if kind >= 2 else slice(None)] += 180
  return x


def labels(count: int) -> np.ndarray:
  """The kind of each of `images(count)`, i32."""
  return (np.arange(count) % 4).astype(np.int32)


@functools.cache
def data() -> Data:
  """128 images to train on, 64 held out."""
  return Data.from_arrays(images(128), labels(128), images(64, seed=1), labels(64))


def config(method: str, **overrides):
  """A config of 10 steps; overrides are dotted keys with '__' for the dot."""
  c = config_lib.base()
  c.total = "10 steps"
  c.batch_size = BATCH
  c.method = dict(name=method, **METHODS[method])
  c.optim.lr = 1e-3
  c.log.update(every="1 steps", tensorboard=False)
  c.checkpoint.every = "5 steps"
  c.eval.update(every="5 steps", bank=64, queries=64, final_bank=64, batch_size=64)
  with c.ignore_type():
    for key, value in overrides.items():
      section, _, leaf = key.replace("__", ".").rpartition(".")
      node = functools.reduce(lambda n, k: n[k], filter(None, section.split(".")), c)
      node[leaf] = value
  return c.lock()


@functools.cache
def experiment(method: str, *, fsdp: int = 1, tensor: int = 1, devices: int = 1) -> Experiment:
  """The method on the first `devices` simulated devices; cached, so each compiles once."""
  import jepax.sharding

  mesh = jepax.sharding.make_mesh(fsdp=fsdp, tensor=tensor, devices=jax.devices()[:devices])
  return prepare(config(method), data=data(), mesh=mesh)


def batches(count: int) -> list[dict[str, np.ndarray]]:
  """Training batches of the tiny data."""
  x = images(128)
  return [{"image": x[np.arange(i * BATCH, (i + 1) * BATCH) % 128]} for i in range(count)]
