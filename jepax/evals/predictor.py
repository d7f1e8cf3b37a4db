"""What a JEPA's predictor knows: does a prediction find its own patch among others?

Two questions, since a prediction that only knows where it is can be right about the first alone:
which place of its image does it retrieve, and which image, of those in the batch, at its place?
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jepax import losses
from jepax.core import Carry, Params
from jepax.methods.jepa import JEPA


def retrieval(
  method: JEPA, params: Params, carry: Carry, images: np.ndarray | jax.Array, key: jax.Array
) -> dict[str, float]:
  """How often a prediction's nearest target-encoder output is the one it stands for.

  Args:
    method: a JEPA; its own masks are drawn.
    params, carry: its state.
    images: u8[b h w c], at least 2, not augmented.
    key: of the masks.

  Returns:
    place: share of predicted patches whose nearest (cosine) among the n patches of their own image
      is themselves; place_chance: 1 / n.
    image: share whose nearest among the b patches at their place is that of their own image;
      image_chance: 1 / b. Near chance, the predictor knows positions only.

  Raises:
    ValueError: fewer than 2 images.
  """
  if len(images) < 2:
    raise ValueError(f"the question which image needs at least 2, found {len(images)}")
  place, image = retrieve(method, params, carry, jnp.asarray(images), key)
  n = method.grid[0] * method.grid[1]
  return {
    "place": float(place),
    "place_chance": 1 / n,
    "image": float(image),
    "image_chance": 1 / len(images),
  }


@functools.partial(jax.jit, static_argnums=0)
def retrieve(
  method: JEPA, params: Params, carry: Carry, images: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`place` and `image` of `retrieval`, f32[] each; its arguments, jitted."""
  x = method.views.clean(images)
  masks = method.draw_masks(key, {"image": images})
  target = method.encoder.apply({"params": carry["target"]}, x)
  target = losses.TARGET_NORMS[method.target_norm](target)  # [b n d]
  context = method.encoder.apply({"params": params["encoder"]}, x, masks.context)
  prediction = method.predictor.apply(
    {"params": params["predictor"]}, context, masks.context, masks.targets, grid=method.grid
  )  # [b m t d]
  target, prediction = _unit(target), _unit(prediction)
  index, valid = masks.targets.index, masks.targets.valid

  own = jnp.einsum("bmtd,bnd->bmtn", prediction, target).argmax(-1)

  def nearest_image(one):  # prediction [m t d] and index [m t] of an image -> i32[m t]
    prediction, index = one
    return jnp.einsum("mtd,cmtd->mtc", prediction, target[:, index]).argmax(-1)

  # One image after the other: all at once would hold b times the targets.
  among = jax.lax.map(nearest_image, (prediction, index))
  same = jnp.arange(len(images))[:, None, None]
  count = valid.sum()
  return ((own == index) & valid).sum() / count, ((among == same) & valid).sum() / count


def _unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
