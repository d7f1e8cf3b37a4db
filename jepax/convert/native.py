"""jepax's own folder: `weights.safetensors`, and `jepax.json` for all that isn't a tensor."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

import jepax
from jepax.convert import files, rules
from jepax.convert.weights import Part, Weights, prefixed, shapes, under
from jepax.models.convnext import ConvNeXt
from jepax.models.decoder import PixelDecoder
from jepax.models.predictor import Predictor
from jepax.models.resnet import ResNet
from jepax.models.vit import ViT
from jepax.names import one_of
from jepax.pretrained import Preprocess

CARD, TENSORS = "jepax.json", "weights.safetensors"
FORMAT = 1
MODULES = {m.__name__: m for m in (ViT, ResNet, ConvNeXt, Predictor, PixelDecoder)}


def write(weights: Weights, folder: Path, *, branch: str | None = None) -> None:
  """Writes both files into an existing folder.

  Args:
    weights: any.
    folder: where.
    branch: the only set of the encoder to write, without predictor and decoder; None for all.
  """
  if branch is not None:
    weights = weights.only(branch)
  tensors = {}
  for name, flat in weights.branches.items():
    tensors |= prefixed(name, flat)
  for name, part in weights.parts.items():
    tensors |= prefixed(name, part.params)
  files.write_safetensors(tensors, folder / TENSORS)
  card = {
    "format": FORMAT,
    "jepax": jepax.__version__,
    "encoder": _fields(weights.module),
    "branches": list(weights.branches),
    "parts": {name: _fields(part.module) for name, part in weights.parts.items()},
    "preprocess": dataclasses.asdict(weights.preprocess),
    "pool": weights.pool,
    "facts": weights.facts,
    "origin": weights.origin,
    "sha256": files.sha256([folder / TENSORS]),
  }
  (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")


def read(folder: Path) -> Weights:
  """What `write` wrote, to the bit.

  Raises:
    ValueError: another format, tensors that don't fit, or that aren't those the card was made for.
  """
  card = files.read_json(folder / CARD)
  if card["format"] != FORMAT:
    raise ValueError(f"{folder / CARD} has format {card['format']}, this jepax reads {FORMAT}")
  paths = files.tensor_files(folder, name=TENSORS)
  digest = files.sha256(paths)
  if digest != card["sha256"]:
    raise ValueError(
      f"{folder / TENSORS} is damaged or was exchanged: its sha256 is {digest}, and {CARD} "
      f"names {card['sha256']}; convert or copy it again"
    )
  preprocess = Preprocess(**_tuples(card["preprocess"]))
  module = _module(card["encoder"])
  parts = {name: _module(fields) for name, fields in card["parts"].items()}
  modules = dict.fromkeys(card["branches"], module) | parts
  wanted = {}
  for name, m in modules.items():
    wanted |= prefixed(name, shapes(m, channels=len(preprocess.mean), width=module.width))
  same = [rules.Rule((path,), path) for path in wanted]
  found = rules.read(same, files.read_safetensors(paths), wanted, where=str(folder))
  return Weights(
    module=module,
    branches={name: under(name, found) for name in card["branches"]},
    parts={name: Part(module=m, params=under(name, found)) for name, m in parts.items()},
    preprocess=preprocess,
    pool=card["pool"],
    facts=card["facts"],
    origin={
      "path": str(folder),
      "format": "jepax",
      "sha256": digest,
      "origin": card["origin"],
    },
  )


def _fields(module: nn.Module) -> dict[str, Any]:
  """A module as JSON: its class, and its fields but flax's own."""
  names = [f.name for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
  fields = {name: getattr(module, name) for name in names}
  return {"module": type(module).__name__, **fields, "dtype": jnp.dtype(module.dtype).name}


def _module(fields: Mapping[str, Any]) -> nn.Module:
  """The module that `_fields` described."""
  fields = _tuples(fields)
  module = MODULES[one_of(fields.pop("module"), MODULES, where="module")]
  return module(**{**fields, "dtype": jnp.dtype(fields["dtype"])})


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
  """JSON knows lists only; modules and preprocessing must hash."""
  return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
