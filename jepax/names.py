"""Names that people type: checked against those allowed, with the nearest one in the error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_of(value: str, allowed: Iterable[str], *, where: str) -> str:
  """Returns `value`, or raises ValueError with the allowed names and the nearest of them.

  Args:
    value: what was found.
    allowed: the names there are.
    where: what the value was given for, 'optim.name'.
  """
  allowed = list(allowed)
  if value not in allowed:
    raise ValueError(f"{where}={value!r} is unknown{nearest(value, allowed)}; allowed: {allowed}")
  return value


def nearest(name: str, names: Iterable[str]) -> str:
  """'; did you mean NAME?' to end an error with, or '' when nothing is near."""
  names = list(names)
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  if not close:  # the right name in the wrong section
    leaf = {n.rsplit(".", 1)[-1]: n for n in names}
    close = [leaf[c] for c in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaf, n=1)]
  return f"; did you mean {close[0]!r}?" if close else ""
