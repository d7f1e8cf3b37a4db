"""data2vec 2.0 for images: predict a teacher's averaged layers from few visible patches.

The teacher sees each whole image once; the student sees it through several masks and shares that
target among them. Source: arXiv 2212.07525; facebookresearch/fairseq, examples/data2vec.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from jepax import losses, values
from jepax.config import Run
from jepax.construct import construct
from jepax.core import Batch, Carry, Features, LossOut, Params, ema, sample_keys
from jepax.data.augment import Augment
from jepax.masks.inverse_block import InverseBlock
from jepax.masks.tokens import Masks, TokenSet, gather
from jepax.methods.masking import build_vit
from jepax.models.decoder import ConvDecoder
from jepax.models.transformer import mlp_outputs
from jepax.optim import linear


def averaged_targets(layers: list[jax.Array]) -> jax.Array:
  """Instance norm of every layer, their mean, layer norm.

  Args:
    layers: the MLPs' outputs of the top blocks at the patches, [b n d] each.

  Returns:
    f32[b n d].
  """
  return losses.layer_norm(sum(losses.instance_norm(x) for x in layers) / len(layers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data2Vec2:
  """data2vec 2.0 as a `jepax.core.Method`.

  encoder: a ViT with a class token. decoder: a ConvDecoder.
  masks: sampler of m contexts [b m k] and the target set of each, [b m t].
  views: device-side augmentation. momentum: step -> EMA momentum of the teacher.
  grid: patches (rows, columns). layers: K, top blocks whose targets are averaged.
  class_weight: of the class token's loss, on its mean over samples and masks.
  noise: standard deviation of what the decoder is given at hidden patches.
  """

  encoder: nn.Module
  decoder: nn.Module
  masks: Any
  views: Any
  momentum: Callable[[jax.Array], jax.Array]
  grid: tuple[int, int]
  layers: int
  class_weight: float
  noise: float = 0.01

  branches: ClassVar[tuple[str, ...]] = ("online", "target")  # the student is what is released
  pool: ClassVar[str] = "mean"
  couples_batch: ClassVar[str] = ""

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """Encoder and decoder parameters; the teacher starts as a copy of the encoder."""
    encoder_key, decoder_key = jax.random.split(key)
    images = self.views.clean(batch["image"])
    masks = self.draw_masks(key, batch)
    encoder = self.encoder.init(encoder_key, images, masks.context)["params"]
    x = self.encoder.apply({"params": encoder}, images, masks.context)
    visible, noise = _flat(masks.context), jnp.zeros((len(x), math.prod(self.grid), x.shape[-1]))
    decoder = self.decoder.init(decoder_key, x[:, 1:], visible, noise, grid=self.grid)["params"]
    target = jax.tree.map(lambda x: x.copy(), encoder)  # its own buffers: the state is donated
    return {"encoder": encoder, "decoder": decoder}, {"target": target}

  def draw_masks(self, key: jax.Array, batch: Batch) -> Masks:
    """The contexts and targets of every sample, from the step's key."""
    sample_key, step_key = jax.random.split(key)
    return self.masks(sample_keys(sample_key, batch, count=batch["image"].shape[0]), step_key)

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: view, teach once, mask, encode and decode m times, compare."""
    view_key, mask_key, noise_key = jax.random.split(key, 3)
    count = batch["image"].shape[0]
    images = self.views(sample_keys(view_key, batch, count=count), batch["image"])
    masks = self.draw_masks(mask_key, batch)
    target = jax.lax.stop_gradient(self.targets(carry["target"], images))  # [b n d]

    x = self.encoder.apply({"params": params["encoder"]}, images, masks.context)  # [b*m 1+k d]
    keys = sample_keys(noise_key, batch, count=count)
    prediction = self._decode(params, x[:, 1:], masks, keys)  # [b m t d]

    # The reference sums over features and multiplies by 1 / sqrt(d): sqrt(d) times the mean.
    scale = math.sqrt(target.shape[-1])
    error = losses.squared(prediction, gather(target, masks.targets))
    regression = scale * losses.token_mean(error, masks.targets.valid)
    summary = rearrange(x[:, 0], "(b m) d -> b m d", b=count)
    wanted = jnp.broadcast_to(target.mean(1)[:, None], summary.shape)
    class_error = losses.squared(summary, wanted)  # [b m d]
    class_loss = scale * class_error.mean()
    each = losses.token_means(error, masks.targets.valid)
    each += self.class_weight * class_error.mean((1, 2))
    metrics = {
      "loss/regression": regression,
      "loss/class": class_loss,
      "train/target_std": _spread(target),
      "train/prediction_std": _spread(prediction),
      "schedule/momentum": self.momentum(step),
      **masks.metrics(),
    }
    return regression + self.class_weight * class_loss, LossOut(carry, metrics, scale * each)

  def targets(self, teacher: Params, images: jax.Array) -> jax.Array:
    """What the teacher says of every patch of whole images: [b h w c] -> f32[b n d]."""
    _, sown = self.encoder.apply({"params": teacher}, images, mutable=["mlp"])
    outputs = mlp_outputs(sown["mlp"], depth=self.encoder.depth, last=self.layers)
    return averaged_targets([x[:, 1:] for x in outputs])

  def _decode(self, params: Params, x: jax.Array, masks: Masks, keys: jax.Array) -> jax.Array:
    """Predictions at the hidden patches, [b m t d], from visible tokens [b*m k d]."""
    b, m, t = masks.targets.index.shape
    shape = (m, math.prod(self.grid), x.shape[-1])
    noise = self.noise * jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    out = self.decoder.apply(
      {"params": params["decoder"]},
      x,
      _flat(masks.context),
      rearrange(noise, "b m n d -> (b m) n d"),
      grid=self.grid,
    )
    return gather(out, _flat(masks.targets)).reshape(b, m, t, -1)

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry:
    """Moves the teacher towards the encoder, after the optimizer step."""
    return {"target": ema(carry["target"], params["encoder"], self.momentum(step))}

  def weights(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """The student's encoder, or the teacher's."""
    return {"target": carry["target"], "online": params["encoder"]}[branch]

  def encode(self, params: Params, carry: Carry, batch: Batch, *, branch: str) -> Features:
    """All patches; tokens leave the class token out, pooled is their mean."""
    weights = self.weights(params, carry, branch=branch)
    x = self.encoder.apply({"params": weights}, self.views.clean(batch["image"]))
    return Features(x[:, 1:], x[:, 1:].mean(1))


def _flat(tokens: TokenSet) -> TokenSet:
  """Sets [b m k] as rows of their own, [b*m k]."""
  return jax.tree.map(lambda x: rearrange(x, "b m k -> (b m) k"), tokens)


def _spread(x: jax.Array) -> jax.Array:
  """Mean over channels of the standard deviation over all tokens: 0 means collapse."""
  x = x.reshape(-1, x.shape[-1])
  return jnp.sqrt(x.var(0, ddof=1) + 1e-6).mean()


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  decoder: Mapping[str, Any],
  masks: Mapping[str, Any],
  views: Mapping[str, Any],
  layers: int,
  momentum: tuple[float, float] = (0.9998, 0.99999),
  momentum_share: float = 1.0,
  class_weight: float = 2.56,
  noise: float = 0.01,
) -> Data2Vec2:
  """data2vec 2.0 for a run.

  Args:
    run: image size, channels, normalisation, steps and compute dtype.
    encoder: arguments of `models.vit.vit`; norms='post' unless given, as in the reference.
    decoder: fields of `models.decoder.ConvDecoder` but `out`.
    masks: fields of `masks.inverse_block.InverseBlock` but the grid; copies is M of the paper.
    views: fields of `data.augment.Augment` but mean and std.
    layers: K, top blocks whose MLP outputs are averaged to the target.
    momentum: of the teacher, first and last, linear between.
    momentum_share: share of the run after which the last is reached.
    class_weight: of the class token's loss on its mean; the reference's weight 0.01 multiplies a
      sum over the samples and masks of a GPU, 2.56 times the mean for its 16 x 16.
    noise: standard deviation of the decoder's input at hidden patches.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  network = build_vit(
    run,
    {"norms": "post", "token_std": 1.0, **encoder},
    class_token=True,
    registers=0,  # the decoder takes patches alone, and the class token has a loss of its own
    mask_token=False,
    drop_path=0.0,  # acts in fine-tuning alone
  )
  grid = run.grid(network.patch)
  if not 1 <= layers <= network.depth:
    raise ValueError(f"method.layers={layers} must lie in 1..{network.depth}, the encoder's depth")
  if not 0 <= momentum[0] <= momentum[1] <= 1 or not 0 < momentum_share <= 1:
    raise ValueError(
      f"method.momentum={momentum} must be (first, last), 0 <= first <= last <= 1, and "
      f"momentum_share={momentum_share} in (0, 1]"
    )
  values.not_negative(class_weight=class_weight, noise=noise)
  fixed = dict(where="method.decoder", dtype=run.dtype, out=network.width)
  return Data2Vec2(
    encoder=network,
    decoder=construct(ConvDecoder, decoder, **fixed),
    masks=construct(InverseBlock, masks, where="method.masks", grid=grid),
    views=construct(Augment, views, where="method.views", mean=run.mean, std=run.std),
    momentum=linear(*momentum, steps=max(1, round(momentum_share * run.steps))),
    grid=grid,
    layers=layers,
    class_weight=class_weight,
    noise=noise,
  )
