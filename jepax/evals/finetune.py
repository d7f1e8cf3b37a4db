"""Fine-tuning: all of an encoder trained with labels, under a linear head on its mean patch.

The learning rate falls by a factor a layer towards the input; images are cropped, flipped and
mixed. What the papers' recipes have beyond that, RandAugment and random erasing, is not here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from jepax.core import LossOut, TrainState, make_train_step, sample_keys
from jepax.data.augment import Augment
from jepax.evals import checks
from jepax.evals.batches import in_batches
from jepax.evals.mixing import Mixing
from jepax.models.transformer import layer_norm
from jepax.models.vit import ViT
from jepax.names import one_of
from jepax.optim import NOT_DECAYED, scale_by_layer, warmup_cosine
from jepax.pretrained import Encoder, Preprocess
from jepax.sharding import batch_sharding, global_batch, replicated

EMBEDDINGS = ("class_token", "position", "registers", "mask_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune:
  """One recipe: AdamW, linear warm-up from 0, cosine to `final_lr`.

  epochs, batch_size: the last, incomplete batch of an epoch is left out.
  learning_rate: of the head; a recipe's rate per 256 images is multiplied by batch_size / 256.
  layer_decay: of depth d, block k = 0 .. d-1 has layer_decay^(d - k) times that rate, patch and
    other embeddings layer_decay^(d + 1), the head and the last norm 1.
  weight_decay: moves neither biases, norm scales nor tokens and positions.
  label_smoothing: share of the target spread evenly over the classes.
  drop_path: rate of the last block, growing linearly from 0 at the first.
  fc_norm: pool the last block's output and norm the mean with a new LayerNorm (MAE); else pool
    what the encoder's own final norm gives.
  head_std: of the head's initial weights, normal; its bias starts at 0.
  crop_scale, crop_ratio, flip: see `jepax.data.augment.Augment`.
  mixing: see `Mixing`.
  """

  epochs: int
  batch_size: int
  learning_rate: float
  layer_decay: float
  weight_decay: float
  warmup_epochs: int = 5
  final_lr: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  label_smoothing: float = 0.1
  drop_path: float = 0.0
  fc_norm: bool = True
  head_std: float = 2e-5
  crop_scale: tuple[float, float] = (0.08, 1.0)
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip: float = 0.5
  mixing: Mixing = dataclasses.field(default_factory=Mixing)

  def __post_init__(self):
    if self.batch_size < 1 or self.epochs < 1 or not 0 <= self.warmup_epochs <= self.epochs:
      raise ValueError(
        "batch_size and epochs must be at least 1 and warmup_epochs within the epochs, found "
        f"{self.batch_size}, {self.epochs}, {self.warmup_epochs}"
      )
    if self.learning_rate <= 0 or not 0 < self.layer_decay <= 1 or self.weight_decay < 0:
      raise ValueError(
        "learning_rate must be above 0, layer_decay in (0, 1] and weight_decay 0 or more, found "
        f"{self.learning_rate}, {self.layer_decay}, {self.weight_decay}"
      )
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(f"label_smoothing must lie in [0, 1), found {self.label_smoothing}")


def mae(variant: str, *, batch_size: int = 1024) -> FineTune:
  """MAE's recipe for ViT 'base', 'large' or 'huge', without RandAugment and erasing.

  MAE also trains its sin-cos positions; here only learned tables train.

  Source: facebookresearch/mae, FINETUNE.md and main_finetune.py.
  """
  recipes = {  # epochs, rate per 256 images, layer decay, drop path
    "base": (100, 5e-4, 0.65, 0.1),
    "large": (50, 1e-3, 0.75, 0.2),
    "huge": (50, 1e-3, 0.75, 0.3),
  }
  epochs, rate, layer_decay, drop_path = recipes[one_of(variant, recipes, where="variant")]
  return FineTune(
    epochs=epochs,
    batch_size=batch_size,
    learning_rate=rate * batch_size / 256,
    layer_decay=layer_decay,
    weight_decay=0.05,
    final_lr=1e-6,
    drop_path=drop_path,
    mixing=Mixing(mixup=0.8, cutmix=1.0),
  )


def ijepa(*, epochs: int = 50, batch_size: int = 528) -> FineTune:
  """I-JEPA's full fine-tuning of ViT-H/16 at 448 pixels, without RandAugment and erasing.

  Rate 1e-4 at a batch of 528, scaled in proportion. Epochs, warm-up, smoothing and final rate
  are MAE's for this size, whose protocol the paper adapts.

  Source: arXiv 2301.08243, appendix A.2.
  """
  return FineTune(
    epochs=epochs,
    batch_size=batch_size,
    learning_rate=1e-4 * batch_size / 528,
    layer_decay=0.75,
    weight_decay=0.04,
    final_lr=1e-6,
    drop_path=0.25,
    mixing=Mixing(mixup=0.8, cutmix=1.0),
  )


def ijepa_low_shot(variant: str, *, batch_size: int = 512) -> FineTune:
  """I-JEPA's fine-tuning on 1 % of the labels, of ViT 'large' or 'huge'.

  Rate 3e-5 at a batch of 512, scaled in proportion. Take the labels by
  `splits.share(labels, num_classes=c, share=0.01, seed=s)`.

  Source: arXiv 2301.08243, appendix A.2.
  """
  decays = {"large": 0.05, "huge": 0.4}
  return FineTune(
    epochs=50,
    batch_size=batch_size,
    learning_rate=3e-5 * batch_size / 512,
    layer_decay=0.75,
    weight_decay=decays[one_of(variant, decays, where="variant")],
  )


class Classifier(nn.Module, kw_only=True):
  """Images f32[b h w c], normalised -> logits f32[b classes]; see FineTune for its fields."""

  encoder: ViT
  num_classes: int
  fc_norm: bool
  head_std: float

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    pooled = self.encoder(images)[:, self.encoder.prefix :].mean(1)  # [b d]
    if self.fc_norm:
      pooled = layer_norm(self.encoder, "fc_norm", jnp.float32)(pooled)
    init = nn.initializers.normal(self.head_std)
    return nn.Dense(self.num_classes, kernel_init=init, name="head")(pooled)


@dataclasses.dataclass(frozen=True, eq=False)
class FineTuned:
  """A fine-tuned classifier. losses: f32[steps], of training; skipped: steps not finite."""

  model: Classifier
  params: Any
  preprocess: Preprocess
  losses: np.ndarray
  skipped: int


def fit(
  encoder: Encoder,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  num_classes: int,
  protocol: FineTune,
  seed: int,
  mesh: Mesh | None = None,
) -> FineTuned:
  """Fine-tunes a copy of the encoder; the encoder given stays as it is.

  Args:
    encoder: whose weights the training starts from; its `pool` is not used.
    images: u8[n h w c], of the encoder's size (`encoder.prepare`).
    labels: i32[n] in 0..num_classes - 1.
    num_classes: of the head.
    protocol: the recipe.
    seed: of the head, the order of the images, augmentation and drop path.
    mesh: devices to split each batch over; None for one device.

  Returns:
    The FineTuned after the last epoch: nothing is chosen on any data.

  Raises:
    ValueError: images of another size, labels out of range, a batch larger than the data, or a
      convolutional encoder.
  """
  _check_images(encoder.preprocess, images)
  if protocol.batch_size > len(images):
    raise ValueError(f"batch_size={protocol.batch_size} is more than the {len(images)} images")
  labels = checks.labels(labels, name="labels", count=len(images), num_classes=num_classes)
  model = classifier(encoder, num_classes=num_classes, protocol=protocol)
  augment = _augment(encoder.preprocess, protocol)
  tx, step = _programs(model, augment, protocol, len(images) // protocol.batch_size)
  state = _start(model, tx, encoder.params, np.zeros((1, *images.shape[1:]), np.float32), seed)
  place = jax.device_put
  if mesh is not None:
    state = jax.device_put(state, replicated(mesh))
    place = functools.partial(global_batch, sharding=batch_sharding(mesh))
  data = {"image": images, "label": np.asarray(labels)}
  state, losses = _run(step, state, data, place, protocol=protocol, seed=seed)
  return FineTuned(model, state.params, encoder.preprocess, losses, int(state.skipped[1]))


def predict(tuned: FineTuned, images: np.ndarray, *, batch_size: int) -> np.ndarray:
  """The most likely class of each image.

  Args:
    tuned: from `fit`.
    images: u8[n h w c], of the encoder's size.
    batch_size: images a forward pass; the last is padded.

  Returns:
    i32[n].
  """
  _check_images(tuned.preprocess, images)
  classify = functools.partial(_predict, (tuned.model, tuned.preprocess), tuned.params)
  return in_batches(classify, images, batch_size=batch_size)


def accuracy(tuned: FineTuned, images: np.ndarray, labels: np.ndarray, *, batch_size: int) -> float:
  """The share of images labelled right, 0 to 1; see `predict`."""
  classes = tuned.model.num_classes
  wanted = checks.labels(labels, name="labels", count=len(images), num_classes=classes)
  return float((predict(tuned, images, batch_size=batch_size) == np.asarray(wanted)).mean())


def classifier(encoder: Encoder, *, num_classes: int, protocol: FineTune) -> Classifier:
  """The module that is trained: the encoder with the protocol's drop path, norm and head."""
  encoder.check_blocks("fine-tuning")
  module = encoder.module.clone(
    drop_path=protocol.drop_path, final_norm=not protocol.fc_norm, parent=None
  )
  return Classifier(
    encoder=module,
    num_classes=num_classes,
    fc_norm=protocol.fc_norm,
    head_std=protocol.head_std,
  )


def optimizer(protocol: FineTune, *, steps_per_epoch: int) -> optax.GradientTransformation:
  """AdamW whose rate, and with it the decay, is scaled layer by layer."""
  warmup, steps = (n * steps_per_epoch for n in (protocol.warmup_epochs, protocol.epochs))
  peak, final = protocol.learning_rate, protocol.final_lr
  return optax.chain(
    optax.scale_by_adam(b1=protocol.b1, b2=protocol.b2),
    optax.add_decayed_weights(protocol.weight_decay, mask=_decayed),
    scale_by_layer(protocol.layer_decay),
    optax.scale_by_learning_rate(warmup_cosine(0, peak, final, warmup=warmup, steps=steps)),
  )


@dataclasses.dataclass(frozen=True)
class Supervised:
  """What `make_train_step` minimises here: cross-entropy of augmented and mixed images."""

  model: Classifier
  augment: Augment
  protocol: FineTune
  couples_batch: bool = True  # mixing pairs the images of a batch

  def loss(self, params, carry, batch, key, step):
    augment_key, mix_key, drop_key = jax.random.split(key, 3)
    count, classes = batch["image"].shape[0], self.model.num_classes
    images = self.augment(sample_keys(augment_key, batch, count=count), batch["image"])
    targets = optax.smooth_labels(
      jax.nn.one_hot(batch["label"], classes), self.protocol.label_smoothing
    )
    images, targets = self.protocol.mixing(mix_key, images, targets)
    logits = self.model.apply({"params": params}, images, rngs={"drop_path": drop_key})
    return optax.softmax_cross_entropy(logits, targets).mean(), LossOut(carry, {})

  def update(self, params, carry, step):
    return carry


def _check_images(preprocess: Preprocess, images: np.ndarray) -> None:
  size = (*preprocess.size, len(preprocess.mean))
  if images.dtype != np.uint8 or images.shape[1:] != size or not len(images):
    raise ValueError(
      f"images must be u8[n {' '.join(map(str, size))}], n at least 1, found {images.dtype}"
      f"{list(images.shape)}; encoder.prepare(images) makes them so"
    )


def _augment(preprocess: Preprocess, protocol: FineTune) -> Augment:
  return Augment(
    mean=preprocess.mean,
    std=preprocess.std,
    crop_scale=protocol.crop_scale,
    crop_ratio=protocol.crop_ratio,
    flip=protocol.flip,
  )


@functools.lru_cache(maxsize=8)
def _programs(model, augment, protocol, per_epoch):
  """Optimizer and jitted step, compiled once for all seeds and weights of one architecture."""
  tx = optimizer(protocol, steps_per_epoch=per_epoch)
  step = make_train_step(Supervised(model, augment, protocol), tx)
  return tx, jax.jit(step, donate_argnums=0)


def _run(step, state, data, place, *, protocol, seed) -> tuple[TrainState, np.ndarray]:
  """All epochs; the state after them, and the loss of every step, f32[steps]."""
  count, batch = len(data["label"]), protocol.batch_size
  losses = []
  for epoch in range(protocol.epochs):
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for rows in order[: count // batch * batch].reshape(-1, batch):
      state, metrics = step(state, place({name: x[rows] for name, x in data.items()}))
      losses.append(metrics["train/loss"])
  return state, np.asarray(jax.device_get(losses), np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(model, tx, weights, image, seed) -> TrainState:
  """Step 0: a copy of the encoder's weights, since the step donates its state, and a fresh head."""
  init_key, run_key = jax.random.split(jax.random.key(seed))
  params = model.init(init_key, image)["params"]
  params["encoder"] = {name: jax.tree.map(jnp.copy, weights[name]) for name in params["encoder"]}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    carry={},
    opt_state=tx.init(params),
    key=jax.random.key_data(run_key),
    skipped=jnp.zeros((2,), jnp.int32),
  )


def _decayed(params):
  kept = (*NOT_DECAYED, *EMBEDDINGS)
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in kept, params)


@functools.partial(jax.jit, static_argnums=0)
def _predict(static, params, images):
  model, preprocess = static
  logits = model.apply({"params": params}, preprocess.normalise(images))
  return logits.argmax(1).astype(jnp.int32)
