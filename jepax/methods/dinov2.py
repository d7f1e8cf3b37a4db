"""DINOv2: a student agrees with an EMA teacher on whole crops (DINO) and hidden patches (iBOT).

With DINOv3's Gram anchoring as an option. Source: arXiv 2304.07193, 2309.16588 and 2508.10104;
facebookresearch/dinov2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from jepax import losses_dino, values
from jepax.config import Run
from jepax.construct import construct
from jepax.core import Batch, Carry, Features, LossOut, Params, ema, sample_keys
from jepax.data.augment import Augment
from jepax.data.views import MultiCrop
from jepax.masks.crop_blocks import CropBlocks
from jepax.masks.tokens import Masks, TokenSet, gather, to_bool
from jepax.methods.masking import build_vit
from jepax.models.heads import DinoHead
from jepax.names import one_of
from jepax.optim import cosine, linear

GLOBAL = 2  # global crops an image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gram:
  """Gram anchoring: patches keep the likenesses that an earlier teacher saw among them.

  weight: of the loss. start: the step from which it counts and at which the Gram teacher is first
  copied from the teacher. every: steps between two copies. copies: the most there are.
  """

  weight: float
  start: int
  every: int
  copies: int

  def __post_init__(self):
    if self.weight < 0 or self.start < 0 or min(self.every, self.copies) < 1:
      raise ValueError(
        f"weight and start must not be negative, every and copies at least 1; found {self.weight}, "
        f"{self.start}, {self.every}, {self.copies}"
      )

  def refreshes(self, step: jax.Array) -> jax.Array:
    """Whether the Gram teacher is copied before this step, bool[]."""
    since = step - self.start
    return (since >= 0) & (since % self.every == 0) & (since < self.every * self.copies)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOv2:
  """DINOv2 as a `jepax.core.Method`; centers, Sinkhorn and KoLeo are of the global batch.

  encoder: a ViT with class token and mask token. dino_head: a DinoHead on class tokens.
  ibot_head: another on hidden patches; None: dino_head itself.
  masks: sampler of the hidden patches of both global crops, targets [b 2 k]; masked: the most
  crops of a sample that have any.
  views: a MultiCrop, two global crops first. grid: patches (rows, columns) of a global crop.
  momentum, temperature: step -> the teacher's EMA momentum, temperature.
  centering: 'softmax' (moving centers, in `carry`) or 'sinkhorn'.
  ibot_weight, koleo_weight: of these losses; that of DINO is 1. koleo_group: rows searched for
  neighbours, None for all. student_temperature, center_momentum: constants. gram: see `Gram`.
  """

  encoder: nn.Module
  dino_head: nn.Module
  ibot_head: nn.Module | None
  masks: Any
  views: Any
  grid: tuple[int, int]
  masked: int
  momentum: Callable[[jax.Array], jax.Array]
  temperature: Callable[[jax.Array], jax.Array]
  centering: str = "softmax"
  ibot_weight: float = 1.0
  koleo_weight: float = 0.1
  koleo_group: int | None = None
  student_temperature: float = 0.1
  center_momentum: float = 0.9
  gram: Gram | None = None

  branches: ClassVar[tuple[str, ...]] = ("target", "online")
  couples_batch: ClassVar[str] = "statistics"
  pool: ClassVar[str] = "class"

  def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Carry]:
    """Encoder and heads; the teacher starts as their copy, centers at 0."""
    encoder_key, dino_key, ibot_key = jax.random.split(key, 3)
    sides = [n * self.encoder.patch for n in self.grid]
    crop = jnp.zeros((1, *sides, batch["image"].shape[-1]))
    encoder = self.encoder.init(encoder_key, crop)["params"]
    feature = jnp.zeros((1, self.encoder.width))
    params = {"encoder": encoder, "dino_head": self.dino_head.init(dino_key, feature)["params"]}
    if self.ibot_head is not None:
      params["ibot_head"] = self.ibot_head.init(ibot_key, feature)["params"]
    # Buffers of their own: the state is donated.
    carry = {"target": jax.tree.map(jnp.copy, params)}
    if self.centering == "softmax":
      heads = {"dino": self.dino_head, "ibot": self.ibot_head or self.dino_head}
      carry["center"] = {name: jnp.zeros(head.prototypes) for name, head in heads.items()}
    if self.gram is not None:
      carry["gram"] = jax.tree.map(jnp.copy, encoder)
    return params, carry

  def draw_views(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    """Every crop of every image, f32[b h w c] each, from the step's key."""
    count = batch["image"].shape[0]
    keys = [
      sample_keys(k, batch, count=count) for k in jax.random.split(key, len(self.views.crops))
    ]
    return self.views(jnp.stack(keys), batch["image"])

  def hide(self, key: jax.Array, batch: Batch) -> Masks:
    """The hidden patches of every sample's global crops, from the step's key."""
    sample_key, step_key = jax.random.split(key)
    return self.masks(sample_keys(sample_key, batch, count=batch["image"].shape[0]), step_key)

  def loss(
    self, params: Params, carry: Carry, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, LossOut]:
    """One batch: crop, mask, teach, learn, compare."""
    view_key, mask_key, drop_key = jax.random.split(key, 3)
    b = batch["image"].shape[0]
    views, masks = self.draw_views(view_key, batch), self.hide(mask_key, batch)
    crops = rearrange(jnp.stack(views[:GLOBAL], 1), "b v h w c -> (b v) h w c")
    hidden = to_bool(masks.targets, count=self.grid[0] * self.grid[1])
    which = busiest(masks.targets, count=self.masked, patches=hidden.shape[-1])  # [b m k]

    teacher = self._encode(carry["target"], crops, b=b)  # [b v p+n d]
    student = self._encode(
      params, crops, b=b, key=drop_key, hidden=rearrange(hidden, "b v n -> (b v) n")
    )
    targets, center, teacher_metrics = self._teach(carry, teacher, which, step)

    summaries = jnp.concatenate([student[:, :, 0], self._local(params, views, drop_key)], 1)
    logits = self.dino_head.apply({"params": params["dino_head"]}, summaries)  # [b s K]
    patches = gather(rearrange(student[:, :, self.encoder.prefix :], "b v n d -> b (v n) d"), which)
    temperature = dict(temperature=self.student_temperature)
    terms = {
      "dino": losses_dino.dino(targets["dino"], logits, **temperature),
      "ibot": losses_dino.ibot(
        targets["ibot"], self._ibot(params, patches), which.valid, crops=GLOBAL * b, **temperature
      ),
      "koleo": sum(
        losses_dino.koleo(student[:, i, 0], group=self.koleo_group) for i in range(GLOBAL)
      ),
    }
    weights = {"dino": 1.0, "ibot": self.ibot_weight, "koleo": self.koleo_weight}
    if self.gram is not None:
      terms["gram"] = self._gram(carry["gram"], student, crops, step)
      weights["gram"] = self.gram.weight
    metrics = {
      **{f"loss/{name}": value for name, value in terms.items()},
      **teacher_metrics,
      "schedule/momentum": self.momentum(step),
      **masks.metrics(),
    }
    loss = sum(weights[name] * value for name, value in terms.items())
    return loss, LossOut({**carry, **center}, metrics)

  def _encode(self, params, crops, *, b, key=None, **arguments) -> jax.Array:
    """Crops side by side [b*v h w c] -> [b v p+n d]; with a key, blocks are dropped."""
    drop = key is not None and self.encoder.drop_path > 0
    rngs = {"drop_path": key} if drop else None
    x = self.encoder.apply({"params": params["encoder"]}, crops, rngs=rngs, **arguments)
    return rearrange(x, "(b v) n d -> b v n d", b=b)

  def _local(self, params, views, key) -> jax.Array:
    """The student's class tokens of the local crops, [b l d]."""
    b, local = len(views[0]), views[GLOBAL:]
    if not local:
      return jnp.zeros((b, 0, self.encoder.width))
    crops = rearrange(jnp.stack(local, 1), "b l h w c -> (b l) h w c")
    return self._encode(params, crops, b=b, key=jax.random.fold_in(key, 1))[:, :, 0]

  def _ibot(self, params, patches) -> jax.Array:
    """Logits of patches, by the head that is theirs."""
    if self.ibot_head is None:
      return self.dino_head.apply({"params": params["dino_head"]}, patches)
    return self.ibot_head.apply({"params": params["ibot_head"]}, patches)

  def _teach(self, carry, teacher, which: TokenSet, step):
    """Distributions of both heads, the centers of the next step, and metrics."""
    target, temperature = carry["target"], self.temperature(step)
    patches = gather(rearrange(teacher[:, :, self.encoder.prefix :], "b v n d -> b (v n) d"), which)
    logits = {
      "dino": self.dino_head.apply({"params": target["dino_head"]}, teacher[:, :, 0]),
      "ibot": self._ibot(target, patches),
    }
    valid, center = {"dino": None, "ibot": which.valid}, {}
    if self.centering == "sinkhorn":
      targets = {
        name: losses_dino.sinkhorn(x, temperature=temperature, valid=valid[name])
        for name, x in logits.items()
      }
    else:
      old, momentum = carry["center"], self.center_momentum
      targets = {
        name: losses_dino.softmax_centered(x, old[name], temperature=temperature)
        for name, x in logits.items()
      }
      center["center"] = {
        name: losses_dino.moved_center(old[name], x, valid=valid[name], momentum=momentum)
        for name, x in logits.items()
      }
    used = targets["dino"].mean((0, 1))
    metrics = {
      "schedule/teacher_temperature": temperature,
      "train/target_entropy": jax.scipy.special.entr(targets["dino"]).sum(-1).mean(),
      "train/prototypes_used": jnp.exp(jax.scipy.special.entr(used).sum()),
    }
    return *jax.lax.stop_gradient((targets, center)), metrics

  def _gram(self, gram_teacher, student, crops, step) -> jax.Array:
    """The Gram loss; before its start 0, and not computed."""
    prefix = self.encoder.prefix

    def compare(patches):
      frozen = self._encode({"encoder": gram_teacher}, crops, b=len(student))[:, :, prefix:]
      frozen = jax.lax.stop_gradient(frozen)
      return losses_dino.gram(*(rearrange(x, "b v n d -> (b v) n d") for x in (patches, frozen)))

    skip = lambda patches: jnp.zeros(())  # noqa: E731
    return jax.lax.cond(step >= self.gram.start, compare, skip, student[:, :, prefix:])

  def update(self, params: Params, carry: Carry, step: jax.Array) -> Carry:
    """Moves the teacher towards the student; copies it to the Gram teacher when due."""
    target = ema(carry["target"], params, self.momentum(step))
    moved = {**carry, "target": target}
    if self.gram is not None:
      due = self.gram.refreshes(step + 1)
      copy = lambda new, old: jnp.where(due, new, old)  # noqa: E731
      moved["gram"] = jax.tree.map(copy, target["encoder"], carry["gram"])
    return moved

  def weights(self, params: Params, carry: Carry, *, branch: str) -> Params:
    """The encoder's parameters: the EMA teacher's, or the student's."""
    return {"target": carry["target"], "online": params}[branch]["encoder"]

  def encode(self, params: Params, carry: Carry, batch: Batch, *, branch: str) -> Features:
    """All patches; pooled is the class token."""
    weights = self.weights(params, carry, branch=branch)
    x = self.encoder.apply({"params": weights}, self.views.clean(batch["image"]))
    return Features(x[:, self.encoder.prefix :], x[:, 0])


def busiest(targets: TokenSet, *, count: int, patches: int) -> TokenSet:
  """Of each sample's sets, the `count` largest, so that heads never see crops without a mask.

  Args:
    targets: index [b v k], one set a crop.
    count: m, at most v; sets beyond it have to be empty.
    patches: n of a crop.

  Returns:
    index [b m k] into the crops' patches side by side, 0 .. v n - 1.
  """
  v = targets.index.shape[1]
  _, crop = jax.lax.top_k(targets.size, count)  # [b m]
  shifted = targets.index + jnp.arange(v)[:, None] * patches
  index, valid = (jnp.take_along_axis(x, crop[..., None], 1) for x in (shifted, targets.valid))
  return TokenSet(jnp.where(valid, index, 0), valid)


def build(
  run: Run,
  *,
  encoder: Mapping[str, Any],
  head: Mapping[str, Any],
  views: Mapping[str, Any],
  local: Mapping[str, Any],
  masks: Mapping[str, Any],
  second: Mapping[str, Any] | None = None,
  ibot_head: Mapping[str, Any] | None = None,
  gram: Mapping[str, Any] | None = None,
  local_views: int = 8,
  momentum: tuple[float, float] = (0.992, 1.0),
  temperature: tuple[float, float] = (0.04, 0.07),
  temperature_share: float = 0.3,
  student_temperature: float = 0.1,
  centering: str = "softmax",
  center_momentum: float = 0.9,
  ibot_weight: float = 1.0,
  koleo_weight: float = 0.1,
  koleo_group: int | None = None,
) -> DINOv2:
  """DINOv2 for a run.

  Args:
    run: image size, channels, normalisation, steps and compute dtype.
    encoder: arguments of `models.vit.vit`; learned positions unless given.
    head: fields of `models.heads.DinoHead`.
    views: fields of `data.augment.Augment` for the global crops, whose size is the image's unless
      given; `second`: those that differ in the second; `local`: all of the local crops'.
    masks: fields of `masks.crop_blocks.CropBlocks` but the grid and crops.
    ibot_head: fields of a DinoHead of its own for patches that differ from `head`; None to share
      the one head.
    gram: weight, start, every (shares of the run) and copies of `Gram`; None for none.
    local_views: local crops an image.
    momentum: of the teacher at the first and last step, on a cosine.
    temperature: of the teacher, first and last, linear over `temperature_share` of the run.
    temperature_share: see there.
    student_temperature: of the student.
    centering: 'softmax' or 'sinkhorn'.
    center_momentum: of 'softmax'.
    ibot_weight, koleo_weight: of these losses.
    koleo_group: rows searched for neighbours, None for the global batch.

  Raises:
    ValueError: an unknown key, or a value that can't work.
  """
  _check(
    momentum, temperature, temperature_share, student_temperature, center_momentum, koleo_group
  )
  values.not_negative(local_views=local_views, ibot_weight=ibot_weight, koleo_weight=koleo_weight)
  one_of(centering, ("softmax", "sinkhorn"), where="method.centering")
  same = dict(mean=run.mean, std=run.std)
  first = construct(Augment, views, where="method.views", **same)
  other = construct(Augment, {**views, **(second or {})}, where="method.second", **same)
  small = construct(Augment, local, where="method.local", **same)
  size = first.size or run.size
  if (other.size or run.size) != size:
    raise ValueError(f"method.second.size={other.size} must be that of the first view, {size}")
  grid = dataclasses.replace(run, size=size).grid(_patch(encoder))
  network = _encoder(run, encoder, grid)
  dataclasses.replace(run, size=small.size or run.size).grid(network.patch)
  heads = dict(where="method.head", dtype=run.dtype)
  own = None if ibot_head is None else construct(DinoHead, {**head, **ibot_head}, **heads)
  sampler = construct(CropBlocks, masks, where="method.masks", grid=grid, crops=GLOBAL)
  return DINOv2(
    encoder=network,
    dino_head=construct(DinoHead, head, **heads),
    ibot_head=own,
    masks=sampler,
    masked=sampler.masked,
    views=MultiCrop((first, other, *[small] * local_views)),
    grid=grid,
    momentum=cosine(*momentum, steps=run.steps),
    temperature=linear(*temperature, steps=max(1, round(temperature_share * run.steps))),
    centering=centering,
    ibot_weight=ibot_weight,
    koleo_weight=koleo_weight,
    koleo_group=koleo_group,
    student_temperature=student_temperature,
    center_momentum=center_momentum,
    gram=_gram(gram, steps=run.steps) if gram else None,
  )


def _gram(section: Mapping[str, Any], *, steps: int) -> Gram:
  """Gram anchoring from a config, where `start` and `every` are shares of the run."""
  section = dict(section)
  for key in ("start", "every"):
    if key in section:
      values.check(section[key], float, where=f"method.gram.{key}")
      if not 0 <= section[key] <= 1:
        raise ValueError(f"method.gram.{key}={section[key]} must be a share of the run, 0 to 1")
      section[key] = max(1, round(section[key] * steps))
  return construct(Gram, section, where="method.gram")


def _patch(encoder: Mapping[str, Any]) -> int:
  """The encoder's patch, which the grid is made of before the encoder is."""
  if "patch" not in encoder or type(encoder["patch"]) is not int:
    raise ValueError("method.encoder.patch must be given, a whole number of pixels")
  return encoder["patch"]


def _encoder(run: Run, encoder: Mapping[str, Any], grid: tuple[int, int]) -> nn.Module:
  """The ViT; a learned table is for global crops, and interpolated for the local ones."""
  positions = {"position": "learned", "resize": "bicubic", "token_std": 1e-6, **encoder}
  if positions["position"] == "learned":
    positions["grid"] = grid
  return build_vit(run, positions, class_token=True, mask_token=True)


def _check(momentum, temperature, share, student_temperature, center_momentum, koleo_group) -> None:
  """Numbers that would fail late, or silently."""
  if not 0 <= center_momentum <= 1 or (koleo_group is not None and koleo_group < 2):
    raise ValueError(
      f"method.center_momentum={center_momentum} must lie in [0, 1], and "
      f"koleo_group={koleo_group} be 2 or more, or None for the global batch"
    )
  if not 0 <= momentum[0] <= momentum[1] <= 1:
    raise ValueError(f"method.momentum={momentum} must be (first, last), 0 <= first <= last <= 1")
  if min(*temperature, student_temperature) <= 0 or not 0 < share <= 1:
    raise ValueError(
      f"method.temperature={temperature} and student_temperature={student_temperature} must be "
      f"above 0, temperature_share={share} in (0, 1]"
    )
