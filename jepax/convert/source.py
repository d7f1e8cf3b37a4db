"""Opening any source of weights by its path."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jepax.convert import files, hf, meta_ijepa, native, run
from jepax.convert.weights import Weights
from jepax.names import one_of

TORCH = (".tar", ".pth", ".pt")


def read(
  path: str | Path, *, heads: int | None = None, drop: Iterable[str] = (), method: Any = None
) -> Weights:
  """Weights of a jepax folder, a run, a Hugging Face folder or a Meta checkpoint.

  Args:
    path: the folder or file.
    heads: attention heads of a Meta checkpoint whose width is none of the paper's.
    drop: beginnings of tensor names of a Hugging Face folder to leave out on purpose.
    method: that of a run which `jepax.fit.run` was given, as there.

  Raises:
    ValueError: none of these, or one that can't be read whole.
  """
  path = Path(path).expanduser()
  if (path / run.CHECKPOINTS).is_dir() and not (path / native.CARD).is_file():
    return run.read(path, method=method)
  if method is not None:
    raise ValueError(f"method= is for the workdir of a run, and {path} is none; leave it out")
  if path.is_file() and path.suffix in TORCH:
    return meta_ijepa.read(path, heads=heads)
  if (path / native.CARD).is_file():
    return native.read(path)
  if (path / "config.json").is_file():
    return hf.read(path, drop=drop)
  state = "there is no such file or folder" if not path.exists() else "it is none of these"
  raise ValueError(
    f"{path} holds no weights, {state}: a run's --workdir, a folder with jepax.json, a Hugging "
    f"Face folder with config.json, or a Meta checkpoint ({', '.join(TORCH)})"
  )


def write(weights: Weights, out: str | Path, *, to: str = "jepax", branch: str | None = None):
  """Writes weights into a new folder, whole or not at all.

  Args:
    weights: what `read` returned, perhaps `at` another size.
    out: a folder that doesn't exist or is empty.
    to: 'jepax' (every branch, unless one is named, with predictor or decoder) or 'hf' (one).
    branch: which set of the encoder.

  Raises:
    ValueError: `out` is not empty, an unknown name, or an architecture that 'hf' lacks.
  """
  writers = {"jepax": native.write, "hf": hf.write}
  writer = writers[one_of(to, writers, where="to")]
  with files.new_folder(Path(out).expanduser()) as folder:
    writer(weights, folder, branch=branch)
