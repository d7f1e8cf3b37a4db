"""What the command lines share: overrides among flags, and errors as one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

from absl import flags


def known(argv: list[str]) -> list[str]:
  """absl's flags taken from `argv`; what is left of it. A wrong one is a mistake like any other."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    fail(f"{error}; --help names what there is")


def parse(argv: list[str], *, prefix: str) -> list[str]:
  """absl's flags; overrides such as --config.KEY=VALUE stay in `argv[1:]`, without their dashes.

  Args:
    argv: of the program.
    prefix: what overrides begin with: '--config.'.
  """
  overrides = [a for a in argv if a.startswith(prefix)]
  left = known([a for a in argv if not a.startswith(prefix)])
  if len(left) > 1:
    fail(f"unexpected argument {left[1]!r}; settings read {prefix}KEY=VALUE")
  return [argv[0], *(a.removeprefix("--") for a in overrides)]


def fail(message: object, *, status: int = 2) -> NoReturn:
  """Prints one line and exits; 2 is for mistakes, which starting again does not mend."""
  print(f"error: {message}", file=sys.stderr)
  sys.exit(status)


@contextlib.contextmanager
def errors(*kinds: type[Exception], status: int = 2) -> Iterator[None]:
  """Ends the program with one line on these errors; --verbosity=1 shows where they were found."""
  try:
    yield
  except kinds as error:
    if flags.FLAGS.verbosity > 0:
      raise
    fail(error, status=status)
