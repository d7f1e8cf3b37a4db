"""Objects from sections of a config: every key is checked against the constructor's signature."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jepax import values
from jepax.names import nearest


def construct(function: Callable, arguments: Mapping[str, Any], *, where: str, **fixed) -> Any:
  """Calls a constructor with a config section, after checking every key against its signature.

  Args:
    function: a class or function.
    arguments: the config section.
    where: the section's dotted name, for errors.
    **fixed: arguments the run decides; a config can't set them.

  Raises:
    ValueError: a key the constructor doesn't take (with the nearest one it does), one it needs
      and was not given, one that the run decides, or whatever the constructor itself refuses.
  """
  if not isinstance(arguments, (Mapping, ConfigDict)):
    raise ValueError(f"{where}={arguments!r} must be a section, such as {where}=dict(...)")
  arguments = dict(arguments)
  known, hints = parameters(function), _hints(function)
  allowed = [name for name in known if name not in fixed]
  for key in arguments:
    if key in fixed and key in known:
      raise ValueError(f"{where}.{key} is decided by the run and can't be set; remove it")
    if key not in known:
      raise ValueError(f"{where}.{key} is unknown{nearest(key, allowed)}; allowed: {allowed}")
    if key in hints:
      values.check(arguments[key], hints[key], where=f"{where}.{key}")
  missing = [n for n, needed in known.items() if needed and n not in {*arguments, *fixed}]
  if missing:
    raise ValueError(f"{where} lacks {missing}; set --config.{where}.{missing[0]}=...")
  try:
    return function(**arguments, **fixed)
  except (ValueError, TypeError) as error:
    nested = str(error).startswith(where)  # from a constructor inside this one
    raise ValueError(str(error) if nested else f"{where}: {error}") from error


def parameters(function: Callable) -> dict[str, bool]:
  """Name -> required, of what a constructor takes.

  One with **fields, as `models.vit.vit`, also takes all that the class it returns takes.
  """
  taken = inspect.signature(function).parameters.values()
  variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  named = {p.name: p.default is p.empty for p in taken if p.kind not in variadic}
  if any(p.kind is p.VAR_KEYWORD for p in taken):
    returned = inspect.get_annotations(function, eval_str=True)["return"]
    named = dict.fromkeys(parameters(returned), False) | named
  # Every linen module has the fields parent and name, which are flax's own.
  return {name: needed for name, needed in named.items() if name not in ("parent", "name")}


def _hints(function: Callable) -> dict[str, Any]:
  """Name -> annotation, of what `parameters` finds."""
  hints = typing.get_type_hints(function)
  if "return" in hints and isinstance(hints["return"], type):
    return typing.get_type_hints(hints["return"]) | hints
  return hints
