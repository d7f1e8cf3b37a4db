"""Hugging Face folders of vision transformers: what their layouts share, reading and writing.

A layout module (`hf_ijepa`, `hf_mae`, `hf_dinov2`) has, beside its constants: `modules(config,
keys)`, the jepax modules of a config.json; `config(weights)`, the reverse; and
`candidates(modules)`, the rules for each way that files name the tensors, the one written first.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import linen as nn

from jepax.convert import files, hf_dinov2, hf_ijepa, hf_mae, preprocessor, rules
from jepax.convert.weights import Part, Weights, prefixed, shapes, under
from jepax.models.vit import ViT
from jepax.names import one_of

LAYOUTS: dict[str, ModuleType] = {
  "ijepa": hf_ijepa,
  "vit_mae": hf_mae,
  "dinov2": hf_dinov2,
  "dinov2_with_registers": hf_dinov2,
}


def read(folder: Path, *, drop: Iterable[str] = ()) -> Weights:
  """Weights as `transformers` saved them, in this version's names or in those of 4.x.

  Args:
    folder: with config.json, preprocessor_config.json and safetensors.
    drop: beginnings of keys to leave out on purpose, such as 'classifier.'.

  Raises:
    ValueError: a model or setting that jepax can't represent, or tensors that don't fit.
  """
  kind, config = _config(folder / "config.json")
  layout = LAYOUTS[kind]
  preprocess = preprocessor.read(folder)
  channels = config["num_channels"]
  if channels != len(preprocess.mean):
    raise ValueError(
      f"{folder}: config.json has num_channels={channels}, and {preprocessor.NAME} "
      f"{len(preprocess.mean)} channel(s) of mean and std"
    )
  paths = files.tensor_files(folder)
  tensors = files.read_safetensors(paths)
  tensors = {key: x for key, x in tensors.items() if not key.startswith(tuple(drop))}
  try:
    modules = layout.modules(config, tensors)
  except ValueError as error:
    raise ValueError(f"{folder / 'config.json'}: {error}") from error
  found = rules.read(
    rules.best(layout.candidates(modules), tensors),
    tensors,
    _shapes(modules, channels=channels),
    where=f"{folder}, read as {kind},",
  )
  noted = {"branch": layout.BRANCH[kind], **config["jepax"]}  # what `write` noted, if it was that
  origin = {"path": str(folder), "format": f"Hugging Face {kind}", "sha256": files.sha256(paths)}
  encoder = modules.pop("encoder")
  return Weights(
    module=encoder,
    branches={noted["branch"]: under("encoder", found)},
    parts={name: Part(module=m, params=under(name, found)) for name, m in modules.items()},
    preprocess=preprocess,
    pool=layout.POOL[kind],
    facts=layout.facts(config),
    origin=origin | ({"origin": noted["origin"]} if "origin" in noted else {}),
  )


def write(weights: Weights, folder: Path, *, branch: str | None = None) -> None:
  """Writes config.json, model.safetensors and preprocessor_config.json into a folder.

  The tensors get the names that files on the hub have, which transformers 4 and 5 both load (and
  which transformers 5 itself writes).

  Args:
    weights: any, as long as a model of transformers has its architecture.
    folder: an existing folder.
    branch: which set of the encoder; the first by default.

  Raises:
    ValueError: an architecture that no such model has.
  """
  if not isinstance(weights.module, ViT):
    raise ValueError(
      f"a Hugging Face folder holds a ViT here, and this is a {type(weights.module).__name__}: "
      "write a jepax folder instead"
    )
  name = next(iter(weights.branches)) if branch is None else branch
  one_of(name, weights.branches, where="branch")
  weights = weights.tabled()
  kind = _kind(weights.module)
  layout = LAYOUTS[kind]
  modules: dict[str, nn.Module] = {"encoder": weights.module}
  parameters = prefixed("encoder", weights.branches[name])
  for part in layout.PARTS:
    if part in weights.parts:
      modules[part] = weights.parts[part].module
      parameters |= prefixed(part, weights.parts[part].params)
  config = {"model_type": kind, **layout.config(weights), "dtype": "float32"}
  config["jepax"] = {"branch": name, "origin": weights.origin}
  table = next(iter(layout.candidates(modules)))
  tensors = rules.write(table, parameters, where=f"these weights as {kind}")
  files.write_safetensors(tensors, folder / "model.safetensors")
  preprocessor.write(weights.preprocess, folder)
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _kind(module: ViT) -> str:
  """The model of transformers with this architecture."""
  found = (module.class_token, module.registers > 0, module.layer_scale is not None)
  kinds = {
    (False, False, False): "ijepa",
    (True, False, False): "vit_mae",
    (True, False, True): "dinov2",
    (True, True, True): "dinov2_with_registers",
  }
  if found not in kinds or (kinds[found] == "vit_mae" and module.mask_token):
    raise ValueError(
      "no model of transformers that jepax knows has this architecture: (class token, registers, "
      f"layer scale) = {found}, mask token {module.mask_token}; allowed: {kinds}, vit_mae without "
      "a mask token. Write a jepax folder instead."
    )
  return kinds[found]


def _shapes(modules: dict[str, nn.Module], *, channels: int) -> dict[str, tuple[int, ...]]:
  """'encoder/embed/kernel' -> shape, of all modules together."""
  found, width = {}, modules["encoder"].width
  for name, module in modules.items():
    found |= prefixed(name, shapes(module, channels=channels, width=width))
  return found


def _config(path: Path) -> tuple[str, dict[str, Any]]:
  """The kind of model and its settings, with transformers' defaults where the file is silent."""
  config = files.read_json(path)
  if "model_type" not in config:
    raise ValueError(f"{path} has no model_type, so it is not the config of a Hugging Face model")
  kind = one_of(str(config["model_type"]), LAYOUTS, where=f"{path}: model_type")
  return kind, {"jepax": {}, **LAYOUTS[kind].DEFAULTS[kind], **config}
