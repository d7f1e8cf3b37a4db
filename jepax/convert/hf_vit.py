"""What the vision transformers of Hugging Face share: config.json, embeddings, names of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jepax.convert.rules import BlockNames, Rule, patch_conv
from jepax.models.vit import ViT
from jepax.names import one_of

# hidden_act -> Stack.activation; the first name of each is the one written
ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "relu": "relu",
}
# Where config.json is silent (transformers 5.23); note the epsilon of I-JEPA and ViT-MAE.
DEFAULTS: dict[str, Any] = dict(
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  hidden_act="gelu",
  image_size=224,
  patch_size=16,
  num_channels=3,
  qkv_bias=True,
)
PROJ = "attention.output.dense"
# transformers 4, the files on the hub, and what save_pretrained of transformers 5 writes
HUB = BlockNames(
  prefix="encoder.layer.{}.",
  qkv=tuple(f"attention.attention.{x}" for x in ("query", "key", "value")),
  proj=PROJ,
  norms=("layernorm_before", "layernorm_after"),
  fc1=("intermediate.dense",),
  fc2="output.dense",
)
# the modules of transformers 5, as state_dict() names them
V5 = BlockNames(
  prefix="layers.{}.",
  qkv=tuple(f"attention.{x}_proj" for x in "qkv"),
  proj="attention.o_proj",
  norms=HUB.norms,
  fc1=("mlp.fc1",),
  fc2="mlp.fc2",
)


def pair(value: Any) -> tuple[int, int]:
  """An image or patch size as (height, width)."""
  return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of `ViT` that all of these models state alike.

  Raises:
    ValueError: a setting that the module can't represent, with the reason.
  """
  activation = one_of(str(config["hidden_act"]), ACTIVATIONS, where="hidden_act")
  if not config["qkv_bias"]:
    raise ValueError("qkv_bias=False is not supported: jepax's blocks have biases on q, k and v")
  patch, image = pair(config["patch_size"]), pair(config["image_size"])
  if patch[0] != patch[1]:
    raise ValueError(f"patch_size={patch} is not supported: jepax's patches are square")
  return dict(
    patch=patch[0],
    width=config["hidden_size"],
    depth=config["num_hidden_layers"],
    heads=config["num_attention_heads"],
    activation=ACTIVATIONS[activation],
    norm_epsilon=config["layer_norm_eps"],
    position="learned",
    grid=(image[0] // patch[0], image[1] // patch[0]),
  )


def config(module: ViT, *, channels: int) -> dict[str, Any]:
  """The reverse of `fields`, of a module with a position table.

  Raises:
    ValueError: post-norm blocks, which no Hugging Face ViT has.
  """
  one_of(module.norms, ("pre",), where="norms of a Hugging Face ViT")
  image = [n * module.patch for n in module.grid]
  return dict(
    hidden_size=module.width,
    num_hidden_layers=module.depth,
    num_attention_heads=module.heads,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    layer_norm_eps=module.norm_epsilon,
    image_size=image[0] if image[0] == image[1] else image,
    patch_size=module.patch,
    num_channels=channels,
    qkv_bias=True,
  )


def activation(module: Any) -> str:
  """hidden_act of a module with a plain MLP."""
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return names[one_of(module.activation, names, where="activation of this Hugging Face model")]


def embeddings(module: ViT, *, prefix: str, mask_token: str = "b n d -> b n d") -> list[Rule]:
  """Rules of everything before the blocks, and of the final norm's place."""
  source, path = f"{prefix}embeddings.", "encoder/"
  rules = patch_conv(f"{source}patch_embeddings.projection", f"{path}embed", patch=module.patch)
  rules.append(Rule((f"{source}position_embeddings",), f"{path}position", "1 n d -> n d"))
  if module.class_token:
    rules.append(Rule((f"{source}cls_token",), f"{path}class_token"))
  if module.mask_token:
    rules.append(Rule((f"{source}mask_token",), f"{path}mask_token", mask_token))
  if module.registers:
    rules.append(Rule((f"{source}register_tokens",), f"{path}registers"))
  return rules


def has(keys: Mapping[str, Any], ending: str) -> bool:
  """Whether a file has a tensor by this name, under whatever prefix."""
  return any(key == ending or key.endswith(f".{ending}") for key in keys)
