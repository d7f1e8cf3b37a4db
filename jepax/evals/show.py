"""Pictures of a frozen encoder for the report: neighbours, map, patch colours, attention."""

from __future__ import annotations

import importlib.util

import numpy as np

from jepax.data.build import Data
from jepax.data.loader import take
from jepax.evals import maps, pictures
from jepax.evals.features import extract, extract_tokens
from jepax.models.vit import ViT
from jepax.pretrained import Encoder
from jepax.report import Pictures

BANK, QUERIES, SHOWN, NEIGHBOURS = 2000, 2000, 8, 8


def gallery(encoder: Encoder, data: Data, *, batch_size: int) -> Pictures:
  """What the report shows of an encoder.

  Args:
    encoder: any.
    data: with held-out images; without, training images stand in, and neighbours may be the image
      itself.
    batch_size: images a forward pass.
  """

  def transform(image, rng):
    return encoder.preprocess.image(image)

  bank = take(data.train, transform, count=BANK, seed=0)
  held = data.train if data.test is None else data.test
  queries = take(held, transform, count=QUERIES, seed=1)
  features = [
    extract(encoder.features, images["image"], batch_size=batch_size) for images in (bank, queries)
  ]
  images = queries["image"][:SHOWN]
  near = pictures.nearest(features[1][:SHOWN], features[0], k=min(NEIGHBOURS, len(features[0])))
  labelled = "label" in bank and "label" in queries
  tokens = extract_tokens(encoder.features, images, batch_size=batch_size)
  attends = isinstance(encoder.module, ViT)
  return Pictures(
    grid=encoder.grid,
    neighbour_queries=images,
    neighbours=bank["image"][near],
    neighbour_labels=bank["label"][near] == queries["label"][:SHOWN, None] if labelled else None,
    embedding=embed(features[1]),
    labels=queries["label"] if labelled else None,
    class_names=data.class_names,
    pca_images=images,
    pca=pictures.patch_pca(tokens, encoder.grid),
    attention_images=images if attends else None,
    attention=attention(encoder, images) if attends else None,
  )


def embed(features: np.ndarray, *, seed: int = 0) -> np.ndarray:
  """A map f32[n 2]: UMAP where umap-learn is installed, else the first two principal components.

  Args:
    features: f32[n d].
    seed: of UMAP.
  """
  if importlib.util.find_spec("umap") is None or len(features) < 16:
    return pictures.embed2d(features)
  import umap

  return umap.UMAP(random_state=seed, n_jobs=1).fit_transform(features).astype(np.float32)


def attention(encoder: Encoder, images: np.ndarray) -> np.ndarray:
  """Where the last layer looks, f32[b heads+1 rows columns]; each head, then the rollout.

  Of the class token where there is one, else of the mean patch; over patches alone, so a map
  sums to 1 less what went to class token and registers.
  """
  prefix = encoder.module.prefix
  both = []
  for image in images:  # all layers and heads of several large images would fill the memory
    found = maps.attention_maps(encoder, image[None])
    both.append(np.concatenate([found[-1], maps.rollout(found)[:, None]], 1))
  both = np.concatenate(both)  # [b h+1 n n]
  rows = both[:, :, 0] if encoder.module.class_token else both[:, :, prefix:].mean(2)
  return rows[..., prefix:].reshape(*rows.shape[:2], *encoder.grid)
