"""The README's Python runs as it stands, and its map names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def beside_a_checkout(tmp_path, monkeypatch):
  """A folder to run in that has the configs, and takes what the examples write."""
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", BLOCKS, ids=["pieces", "one call", "own method"])
def test_example(block, beside_a_checkout, capsys):
  exec(compile(block, "README.md", "exec"), {})
  shown = capsys.readouterr().out.splitlines()
  for line in re.findall(r"print\(.*\)  # (\(.*\))$", block, re.MULTILINE):
    assert line in shown  # the shapes that the README states


def test_paths_exist():
  assert len(BLOCKS) == 3
  paths = re.findall(r"`((?:jepax|configs|tests|docs)/[\w./-]+)`", TEXT)
  assert len(paths) > 15
  for path in paths:
    if "NAME" in path:  # where the reader's own method goes
      continue
    assert (ROOT / path).exists(), path
