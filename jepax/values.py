"""Values that people type: checked against the annotations of what takes them."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

_LEAVES = (bool, int, float, str)  # of these the type must be exactly this one


def check(value: Any, hint: Any, *, where: str) -> None:
  """Raises ValueError unless a value is of its annotated type and its numbers are finite.

  An int serves as a float and a list as a tuple. Annotations other than bool, int, float, str,
  None, sections (mappings), tuples and unions of these are not looked into.

  Args:
    value: what was found.
    hint: the annotation, resolved (`typing.get_type_hints`).
    where: what the value was given for, 'optim.lr'.
  """
  if not _fits(value, hint):
    raise ValueError(f"{where}: found {value!r}, expected {_name(hint)}")
  check_finite(value, where=where)


def check_finite(value: Any, *, where: str) -> None:
  """Raises ValueError on NaN or infinity, alone or in a tuple or list."""
  numbers = value if isinstance(value, (tuple, list)) else (value,)
  if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
    raise ValueError(f"{where}: found {value!r}, expected finite numbers")


def not_negative(**numbers: float) -> None:
  """Raises ValueError where one of a method's numbers, by its key in a config, is below 0."""
  for name, number in numbers.items():
    if number < 0:
      raise ValueError(f"method.{name}={number} must not be negative")


def _fits(value: Any, hint: Any) -> bool:
  if hint is None or hint is type(None):
    return value is None
  if hint in _LEAVES:
    return type(value) is hint or (hint is float and type(value) is int)
  arguments = typing.get_args(hint)
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return any(_fits(value, option) for option in arguments)
  if typing.get_origin(hint) is Mapping:
    return isinstance(value, (Mapping, ConfigDict))
  if typing.get_origin(hint) is tuple:
    return isinstance(value, (tuple, list)) and _items_fit(value, arguments)
  return True


def _items_fit(values: Iterable[Any], hints: tuple[Any, ...]) -> bool:
  values = tuple(values)
  if hints[1:] == (...,):
    hints = hints[:1] * len(values)
  return len(values) == len(hints) and all(map(_fits, values, hints))


def _name(hint: Any) -> str:
  """'int', 'tuple[float, float]', 'float | None', 'a section | None'."""
  if isinstance(hint, type) and not typing.get_args(hint):
    return hint.__name__
  return str(hint).replace("collections.abc.Mapping[str, typing.Any]", "a section")
