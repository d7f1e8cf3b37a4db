"""What all sections of the report share."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

import numpy as np

NAMES = {
  "knn": "k-NN",
  "linear": "linear probe",
  "start": "start weights",
  "random_init": "random init",
  "pixels": "raw pixels",
}


@dataclasses.dataclass(frozen=True)
class Pictures:
  """What can be looked at; every field may be None and takes its section with it.

  images: u8[n h w c], with context: bool[n N] (patches the encoder sees), targets: bool[n m N]
    (patches it predicts) and grid: (rows, columns) of product N, in raster order.
  reconstruction_images: u8[b h w c], with is_masked: bool[b rows columns] (patches hidden from the
    encoder) and reconstruction: u8[b h w c], where these are predicted.
  neighbour_queries: u8[q h w c] and neighbours: u8[q k h w c], nearest first;
    neighbour_labels: bool[q k], whether each has the query's label.
  embedding: f32[n 2], with labels: i32[n] and class_names: one a label.
  pca_images: u8[b h w c] and pca: u8[b gh gw 3], patch features as colours.
  attention_images: u8[b h w c] and attention: f32[b k gh gw], where heads look; the last of the k
    is the rollout through all layers.
  """

  images: np.ndarray | None = None
  context: np.ndarray | None = None
  targets: np.ndarray | None = None
  grid: tuple[int, int] | None = None
  reconstruction_images: np.ndarray | None = None
  is_masked: np.ndarray | None = None
  reconstruction: np.ndarray | None = None
  neighbour_queries: np.ndarray | None = None
  neighbours: np.ndarray | None = None
  neighbour_labels: np.ndarray | None = None
  embedding: np.ndarray | None = None
  labels: np.ndarray | None = None
  class_names: Sequence[str] | None = None
  pca_images: np.ndarray | None = None
  pca: np.ndarray | None = None
  attention_images: np.ndarray | None = None
  attention: np.ndarray | None = None


def name_of(identifier: str) -> str:
  """A probe's or an encoder's name in words, escaped."""
  return html.escape(NAMES[identifier] if identifier in NAMES else identifier.replace("_", " "))


def section(title: str, aside: Sequence[str], body: str) -> str:
  """A heading and how to read it on the left, what there is to read on the right."""
  notes = "".join(f"<p>{html.escape(note)}</p>" for note in aside)
  return (
    f'\n<section><div class="aside"><h2>{html.escape(title)}</h2>{notes}</div>'
    f'<div class="body">{body}</div></section>'
  )


def key(text: str, colour: str, kind: str = "") -> str:
  """An entry of a legend; `text` is HTML, `colour` a CSS variable or '#rrggbb'."""
  value = f"var({colour})" if colour.startswith("--") else colour
  return f'<span class="key {kind}" style="--c:{value}">{text}</span>'
