"""The report's pictures: masks, neighbours, the map of the embedding, patches as colours."""

from __future__ import annotations

import colorsys
import html
from collections.abc import Sequence

import numpy as np

from jepax.report import plots
from jepax.report.parts import Pictures, key, section

MAX_IMAGES = 8
MAX_NEIGHBOURS = 8
MAX_POINTS = 5000
MAX_KEYS = 24  # classes; with more a legend is no help
# Ten hues that can be told apart on light and on dark ground.
HUES = (
  "#3b7de0",
  "#e8862e",
  "#2fa772",
  "#d64545",
  "#9367d4",
  "#a9744f",
  "#e06bb0",
  "#7d8794",
  "#b9ac1f",
  "#22b0c4",
)


def masks(pictures: Pictures) -> str:
  """Image, what the encoder sees of it, and the blocks it has to predict."""
  parts = (pictures.images, pictures.context, pictures.targets, pictures.grid)
  if any(part is None for part in parts):
    return ""
  images, context, targets, grid = parts
  _same_length(images=images, context=context, targets=targets)
  if context.shape[-1] != grid[0] * grid[1] or targets.shape[-1] != grid[0] * grid[1]:
    raise ValueError(
      f"context and targets must cover {grid[0] * grid[1]} patches for grid {grid}, "
      f"found {context.shape[-1]} and {targets.shape[-1]}"
    )
  rows = []
  for image, seen, blocks in list(zip(images, context, targets, strict=True))[:MAX_IMAGES]:
    uri = plots.image_uri(image)
    rows.append(
      f'<div class="three">{_image(image, uri=uri)}'
      f"{plots.context_overlay(uri, np.asarray(seen, bool).reshape(grid))}"
      f"{plots.target_overlay(uri, np.asarray(blocks, bool).reshape(-1, *grid))}</div>"
    )
  rows = _headed(rows, "image", "context", "targets")
  return section(
    "Masks on real images",
    [
      "Each image gets masks of its own. The encoder sees the context and predicts the features "
      f"of {targets.shape[1]} target blocks, one colour each.",
      f"{grid[0]} x {grid[1]} patches.",
    ],
    f'<div class="masks">{rows}</div>',
  )


def reconstructions(pictures: Pictures) -> str:
  """Image, what the encoder sees of it, and the same with the hidden patches predicted."""
  images, masked, predicted = (
    pictures.reconstruction_images,
    pictures.is_masked,
    pictures.reconstruction,
  )
  if images is None or masked is None or predicted is None:
    return ""
  _same_length(reconstruction_images=images, is_masked=masked, reconstruction=predicted)
  rows = []
  for image, hidden, whole in list(zip(images, masked, predicted, strict=True))[:MAX_IMAGES]:
    uri = plots.image_uri(image)
    seen = plots.context_overlay(uri, ~np.asarray(hidden, bool))
    rows.append(f'<div class="three">{_image(image, uri=uri)}{seen}{_image(whole)}</div>')
  return section(
    "Reconstructions",
    [
      "Held-out images, what the encoder sees of them, and the same with the hidden patches "
      "predicted.",
      "Where the method predicts standardised patches, each is shown with the true patch's mean "
      "and standard deviation, which it does not predict.",
    ],
    f'<div class="masks">{_headed(rows, "image", "visible", "reconstruction")}</div>',
  )


def _headed(rows: Sequence[str], *names: str) -> str:
  """Rows of three pictures, two side by side, under the names of their columns."""
  heads = "".join(f"<div>{name}</div>" for name in names)
  heads = f'<div class="three heads">{heads}</div>'
  return "".join(f"<div>{heads * (i < 2)}{row}</div>" for i, row in enumerate(rows))


def neighbours(pictures: Pictures) -> str:
  """A query a row, then its nearest neighbours, marked by whether they share its label."""
  queries, near = pictures.neighbour_queries, pictures.neighbours
  if queries is None or near is None:
    return ""
  _same_length(neighbour_queries=queries, neighbours=near)
  near = near[:, :MAX_NEIGHBOURS]
  match = pictures.neighbour_labels
  columns = f"grid-template-columns:1.12fr .12fr repeat({near.shape[1]}, 1fr)"
  rows = []
  for i in range(min(len(queries), MAX_IMAGES)):
    cells = [f'<div class="cell">{_image(queries[i])}</div><div></div>']
    for j, image in enumerate(near[i]):
      mark = "" if match is None else ("yes" if match[i, j] else "no")
      cells.append(f'<div class="cell {mark}">{_image(image)}</div>')
    rows.append(f'<div class="near" style="{columns}">{"".join(cells)}</div>')
  aside = ["Each row: a held-out image, then the training images nearest to it by cosine."]
  if match is not None:
    aside.append("Green: the same label; red: another. No label was used in training.")
  return section("Nearest neighbours", aside, f"<div>{''.join(rows)}</div>")


def embedding(pictures: Pictures) -> str:
  """The two-dimensional map of the features, coloured by class where labels exist."""
  points = pictures.embedding
  if points is None:
    return ""
  points = np.asarray(points)[:MAX_POINTS]
  keys = ""
  if pictures.labels is None:
    colours = [HUES[0]] * len(points)
  else:
    labels = np.asarray(pictures.labels)[:MAX_POINTS]
    _same_length(embedding=points, labels=labels)
    classes = int(labels.max()) + 1
    palette = _palette(classes)
    colours = [palette[label] for label in labels]
    names = pictures.class_names or [str(c) for c in range(classes)]
    if classes <= MAX_KEYS:
      entries = zip(names, palette, strict=False)  # a class may have no point here
      keys = "".join(key(html.escape(str(name)), colour, "dot") for name, colour in entries)
  picture = f'<img class="map" src="{plots.scatter(points, colours)}" alt="map of the embedding">'
  return section(
    "Map of the embedding",
    [
      f"{len(points):,} held-out images on two axes of their features. Classes are only colours: "
      "training never saw them.",
    ],
    f'{picture}<div class="keys">{keys}</div>' if keys else picture,
  )


def patch_colours(pictures: Pictures) -> str:
  """Images beside their patch features as colours."""
  images, colours = pictures.pca_images, pictures.pca
  if images is None or colours is None:
    return ""
  _same_length(pca_images=images, pca=colours)
  pairs = "".join(
    f'<div class="two">{_image(image)}{_image(patches)}</div>'
    for image, patches in list(zip(images, colours, strict=True))[:MAX_IMAGES]
  )
  return section(
    "What patches have in common",
    [
      "The first three principal components of the patch features as red, green and blue: "
      "patches of one colour have like features, across all images.",
    ],
    f'<div class="pairs">{pairs}</div>',
  )


def attention(pictures: Pictures) -> str:
  """Images beside where each head looks, bright being much."""
  images, maps = pictures.attention_images, pictures.attention
  if images is None or maps is None:
    return ""
  _same_length(attention_images=images, attention=maps)
  maps = np.concatenate([maps[:, :-1][:, : MAX_NEIGHBOURS - 1], maps[:, -1:]], 1)
  columns = f"grid-template-columns:1.12fr .12fr repeat({maps.shape[1]}, 1fr)"
  rows = []
  for image, heads in list(zip(images, maps, strict=True))[: MAX_IMAGES // 2]:
    cells = [f'<div class="cell">{_image(image)}</div><div></div>']
    cells += [f'<div class="cell">{_image(_brightness(head))}</div>' for head in heads]
    rows.append(f'<div class="near" style="{columns}">{"".join(cells)}</div>')
  return section(
    "Where it looks",
    [
      "Attention of the last layer, head by head, of the class token where there is one, else of "
      "the mean patch; last, the rollout through all layers. Each map has its own scale.",
    ],
    f"<div>{''.join(rows)}</div>",
  )


def _brightness(values: np.ndarray) -> np.ndarray:
  """f32[h w] -> u8[h w 1] from its least to its largest value."""
  span = max(float(values.max() - values.min()), 1e-12)
  return np.rint(255 * (values - values.min()) / span).astype(np.uint8)[..., None]


def _palette(classes: int) -> Sequence[str]:
  if classes <= len(HUES):
    return HUES
  # Neighbouring classes lie a golden ratio of the circle apart, so that no two next to each
  # other look alike.
  hues = (np.arange(classes) * 0.618034) % 1
  shades = (colorsys.hls_to_rgb(hue, 0.55, 0.6) for hue in hues)
  return ["#" + "".join(f"{round(255 * part):02x}" for part in shade) for shade in shades]


def _image(image: np.ndarray, *, uri: str | None = None) -> str:
  uri = plots.image_uri(image) if uri is None else uri
  return f'<img{plots.sharpness(uri)} src="{uri}" alt="">'


def _same_length(**arrays: np.ndarray) -> None:
  if len({len(array) for array in arrays.values()}) > 1:
    found = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
    raise ValueError(f"these must have one entry an image each, found {found}")
