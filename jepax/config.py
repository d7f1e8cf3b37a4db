"""Configs: plain Python files, dotted overrides, durations, and errors before anything compiles.

A config file defines `get_config(arg='') -> ConfigDict`, starting from `base()`, which lists every
key there is. The section `method` is open: its keys are the arguments of the method's `build`.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jepax import recipe, values
from jepax.construct import construct, parameters
from jepax.data import build as data_build
from jepax.names import nearest, one_of

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
UNITS = ("steps", "epochs", "examples", "%")


def base() -> ConfigDict:
  """Every key of a config with its default. Durations read '100 steps', '3 epochs', '5%'."""
  config = ConfigDict()
  config.seed = 0
  config.total = "100 epochs"  # length of training
  config.batch_size = 128  # examples an optimizer step, over all devices and micro-batches
  config.accumulate = 1  # micro-batches a step
  config.precision = "float32"  # of matrix products: float32 or bfloat16; all else is float32
  config.data = data_build.defaults()
  config.method = ConfigDict()
  config.optim = ConfigDict(
    dict(
      name="adamw",  # adamw, lars or sgd
      lr=1e-3,  # at the end of the warm-up
      start_lr=0.0,
      final_lr=1e-6,
      warmup="10%",
      weight_decay=0.05,  # never on biases and norms, but with sgd
      final_weight_decay=0.05,  # reached on a cosine
      b1=0.9,  # LARS, SGD: momentum
      b2=0.999,
      unscheduled="",  # part of the parameters that keeps lr throughout: 'predictor' in SimSiam
      clip=0.0,  # largest global norm of the gradient; 0 for none
      clip_parts=False,  # encoder and each head on its own (DINOv2)
      layer_decay=1.0,  # factor on the rate for each layer below the encoder's output
      embed_scale=1.0,  # further factor on the rate of the patch embedding
      bias_scale=1.0,  # factor on the rate of biases and norms
      freeze="0 steps",  # how long the prototypes of heads don't move at the start
      frozen="",  # parameters that never move: 'encoder/embed', or several with commas between
    )
  )
  # Weights to start from: whatever jepax.pretrained.load reads; '' for random initialisation.
  # branch: which set of theirs, '' for each of the method's from its namesake, else their first.
  # positions: how theirs come to another grid of patches, 'interpolate' or 'recompute'.
  config.init = ConfigDict(dict(weights="", branch="", positions=""))
  # data=-1: all devices the others leave; cpu_devices: what a CPU's cores are, 0 for a good number.
  config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, cpu_devices=0))
  config.checkpoint = ConfigDict(dict(every="10%", keep=2))
  config.log = ConfigDict(dict(every="20 steps", tensorboard=True, wandb=""))  # wandb: project
  config.eval = ConfigDict(
    dict(
      every="10%",  # the online probes; 0 for none but the last
      bank=2000,  # training images whose features the online probes fit on
      queries=1000,  # held-out images they are scored on
      final_bank=10000,  # the same for the numbers in results.json
      final_queries=10000,
      batch_size=256,  # images a forward pass
    )
  )
  # Early stopping on a logged metric; '' for none. knn/target: max; the held-out eval/loss: min.
  # collapse: probes in a row with a collapse alarm that end the run; 0 to let it go on.
  config.stop = ConfigDict(dict(metric="", mode="max", patience=3, min_delta=0.0, collapse=0))
  config.max_skipped = 10  # non-finite updates in a row that end the run
  return config


@dataclasses.dataclass(frozen=True)
class Run:
  """What a method's `build` knows of the run.

  size, channels: of the square images; mean, std: a channel, of pixels in [0, 1];
  steps: optimizer steps; dtype: of matrix products.
  """

  size: int
  channels: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  steps: int
  dtype: Any = jnp.float32

  def grid(self, patch: int) -> tuple[int, int]:
    """Patches (rows, columns) of an image; raises ValueError where they don't divide."""
    if patch < 1 or self.size % patch:
      fits = [p for p in range(2, self.size + 1) if self.size % p == 0]
      raise ValueError(
        f"method.encoder.patch={patch} does not divide data.size={self.size}; patches that do: "
        f"{fits}"
      )
    return (self.size // patch, self.size // patch)


# --- loading --------------------------------------------------------------------------------


def load(spec: str | Path, overrides: Iterable[str] = ()) -> ConfigDict:
  """Reads a config file, which may import the files beside it, and applies overrides.

  Args:
    spec: 'path/to/file.py' or 'path/to/file.py:arg', the arg handed to get_config.
    overrides: 'dotted.key=value' strings; values are Python literals, bare words are strings.

  Returns:
    The config, locked.

  Raises:
    ValueError: a missing file, one that fails (with the line), an unknown key (with the nearest
      valid one) or a value of the wrong type.
  """
  name, _, arg = str(spec).partition(":")
  path = Path(name)
  if path.suffix != ".py" or not path.is_file():
    near = nearest(path.name, [p.name for p in path.parent.glob("*.py")])
    raise ValueError(f"{name!r} is no config file: there is no such Python file{near}")
  config = recipe.execute(path, arg)
  if not isinstance(config, ConfigDict):
    raise ValueError(
      f"get_config of {name} must return a ConfigDict, made by jepax.config.base(); it returned "
      f"{type(config).__name__}"
    )
  check_keys(config)
  # A name comes before the keys of what it names, in whatever order they are given.
  for text in sorted(overrides, key=lambda text: ".name=" not in text):
    override(config, text)
  return config.lock()


def parse_arg(arg: str, **defaults: bool | int | float | str) -> ConfigDict:
  """The part of --config after the colon: 'smoke,patch=7' over defaults(smoke=False, patch=4).

  Raises:
    ValueError: an unknown name, or a value of another type than its default.
  """
  values = dict(defaults)
  for item in filter(None, arg.split(",")):
    key, given, text = item.partition("=")
    if key not in defaults:
      raise ValueError(
        f"config argument {key!r} is unknown{nearest(key, defaults)}; allowed: {list(defaults)}"
      )
    if not given and not isinstance(defaults[key], bool):
      raise ValueError(f"config argument {key!r} has no value; write {key}={defaults[key]}")
    values[key] = _read(text if given else "true", like=defaults[key], where=f":{key}")
  return ConfigDict(values)


def check_keys(config: ConfigDict) -> None:
  """Raises ValueError on a key that `base()` lacks, one that is missing, or a wrong value in one.

  Inside the section `method` any key goes: only the method's build knows. No number is NaN or
  infinite, and values have the types of those in `base()`; a bare number serves as a duration.
  """
  expected = base()

  def walk(section, known, prefix):
    for key in section:
      if key not in known:
        names = [prefix + k for k in known]
        raise ValueError(f"config key {prefix + key!r} is unknown{nearest(prefix + key, names)}")
    for key, value in known.items():
      if key not in section:
        raise ValueError(f"config key {prefix + key!r} is missing; start from jepax.config.base()")
      if not isinstance(value, ConfigDict):
        values.check(section[key], _hint(known, key), where=prefix + key)
      elif not isinstance(section[key], ConfigDict):
        raise ValueError(f"{prefix + key}={section[key]!r} must be a section, such as dict(...)")
      elif key != "method":
        walk(section[key], value, f"{prefix}{key}.")

  walk(config, expected, "")
  for key, value in flatten(config.method.to_dict(), "method.").items():
    values.check_finite(value, where=key)


def _hint(known: ConfigDict, key: str) -> Any:
  """The annotation that a value of `base()` stands for."""
  kind = known.get_type(key)
  if known[key] is None:  # a placeholder
    return kind | None
  if kind is tuple:
    return tuple[float, ...]
  return str | int | float if kind is str else kind


def override(config: ConfigDict, assignment: str) -> None:
  """Applies one 'dotted.key=value' in place; raises ValueError as `load` does.

  Where a section of the method gets another `name`, keys that the recipe set for the old choice and
  that the new one does not take go.
  """
  dotted, given, text = assignment.partition("=")
  if not given:
    raise ValueError(f"override --config.{dotted} has no value; write --config.{dotted}=VALUE")
  *parents, leaf = dotted.split(".")
  section = config
  for i, name in enumerate(parents):
    if parents[:i] == ["method"] and name not in section and name in _method_keys(section):
      section[name] = ConfigDict()  # one that the recipe leaves out, such as method.regulariser
    if name not in section or not isinstance(section[name], ConfigDict):
      _raise_unknown(config, dotted, at=".".join(parents[: i + 1]))
    section = section[name]
  if parents[:1] == ["method"] and leaf == "name":
    _drop_others(config.method, parents[1:], text)
  if leaf not in section:  # a key of the method's build, which knows its own
    if dotted.startswith("method.") and dotted != "method.name":
      section[leaf] = text if text == "none" else _literal(text)  # 'none' names a choice: remat
      return
    _raise_unknown(config, dotted, at=dotted)
  if isinstance(section[leaf], ConfigDict):
    raise ValueError(f"--config.{dotted} is a section; its keys: {list(section[leaf])}")
  section[leaf] = _read(
    text, like=section[leaf], kind=section.get_type(leaf), where=f"--config.{dotted}"
  )


def _method_keys(section: ConfigDict) -> Iterable[str]:
  """What the method that a section names can be given."""
  name = section.get("name")
  if name not in methods():
    return ()
  return parameters(importlib.import_module(f"jepax.methods.{name}").build)


def _drop_others(method: ConfigDict, path: list[str], name: str) -> None:
  """Drops keys of the section at `path` that other choices take and the one called `name` does not.

  Those that no choice takes stay, for the method's build to refuse.
  """
  if method.get("name") not in methods() or len(path) != 1:
    return
  module = importlib.import_module(f"jepax.methods.{method.name}")
  choices = getattr(module, "CHOICES", {})
  known = choices[path[0]]() if path[0] in choices else {}
  if name not in known:
    return
  others = {key for choice in known.values() for key in parameters(choice)}
  for key in (others - {*parameters(known[name])}) & {*method[path[0]]}:
    del method[path[0]][key]


def _raise_unknown(config: ConfigDict, dotted: str, *, at: str) -> None:
  names = list(flatten(config.to_dict()))
  *parents, _ = at.split(".")
  section = config
  for name in parents:
    section = section[name]
  of = ".".join(parents) or "the config"
  raise ValueError(
    f"--config.{at} is unknown{nearest(dotted, names)}; keys of {of}: {list(section)}"
  )


def _literal(text: str) -> Any:
  words = {"true": True, "false": False, "none": None}
  if text.lower() in words:
    return words[text.lower()]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _read(text: str, *, like: Any, where: str, kind: type | None = None) -> Any:
  """`text` as a value of the type of the one it replaces, or ValueError.

  Args:
    text: a Python literal; for strings, the string itself.
    like: the value replaced. A None gives way to anything.
    where: the key, for the error.
    kind: the type declared for the key, where `like` is None.
  """
  kind = type(like) if like is not None else kind
  value = _literal(text)
  if like is None and (value is None or kind in (None, type(None))):
    return value
  if kind is str:
    return text
  whole = kind is int and type(value) is float and value.is_integer()
  if whole or (kind is float and type(value) is int):
    return kind(value)
  if kind in (tuple, list) and isinstance(value, (tuple, list)):
    return kind(value)
  if type(value) is not kind:
    example = "" if like is None else f" such as {like!r}"
    raise ValueError(f"{where}: found {text!r}, expected {kind.__name__}{example}")
  return value


# --- values ---------------------------------------------------------------------------------


def duration(
  value: str | int, *, where: str, steps_per_epoch: int, batch_size: int, total: int | None = None
) -> int:
  """A length of training in optimizer steps.

  Args:
    value: '100 steps', '3 epochs', '1e6 examples', '10%' (of total), or a bare number of steps.
    where: the key, for the error.
    steps_per_epoch: floor(training images / batch size).
    batch_size: images a step.
    total: what '%' refers to, in steps.

  Returns:
    Steps, rounded to the nearest; at least 1 unless the value is 0.

  Raises:
    ValueError: an unknown unit, a negative value, '%' where there is no total.
  """
  number, _, unit = str(value).strip().replace("%", " %").partition(" ")
  unit = unit.strip() or "steps"
  if unit + "s" in UNITS:  # '1 epoch'
    unit += "s"
  scale = {"steps": 1.0, "epochs": steps_per_epoch, "examples": 1 / batch_size}
  if total is not None:
    scale["%"] = total / 100
  try:
    amount = float(number)
  except ValueError:
    amount = -1.0
  if unit not in scale or not 0 <= amount < float("inf"):
    units = ", ".join(repr(f"10 {u}" if u != "%" else "10%") for u in UNITS if u in scale)
    raise ValueError(f"{where}={value!r} is no duration; write one like {units}")
  return max(round(amount * scale[unit]), int(amount > 0))


def positive(config: ConfigDict, *names: str) -> None:
  """Raises ValueError where a dotted key is not a positive number."""
  values = flatten(config.to_dict())
  for name in names:
    if not values[name] > 0:
      raise ValueError(f"{name}={values[name]!r} must be positive")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat


# --- building -------------------------------------------------------------------------------


def methods() -> list[str]:
  """Names of the methods a config can ask for: files under jepax/methods that offer `build`."""
  import jepax.methods as package

  names = [m.name for m in pkgutil.iter_modules(package.__path__)]
  return [n for n in names if hasattr(importlib.import_module(f"jepax.methods.{n}"), "build")]


def build_method(section: Mapping[str, Any], run: Run) -> Any:
  """The method that a config's section `method` describes, found by its name.

  Args:
    section: `name`, and the arguments of that method's `build`.
    run: what the rest of the config decides.

  Raises:
    ValueError: no name, an unknown name, or anything `construct` refuses.
  """
  arguments = dict(section)
  name = one_of(str(arguments.pop("name", "")), methods(), where="method.name")
  module = importlib.import_module(f"jepax.methods.{name}")
  return construct(module.build, arguments, where="method", run=run)
