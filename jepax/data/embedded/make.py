"""Makes fashion_mnist_12k.npz, the data set that ships with jepax, from the four original files.

    python jepax/data/embedded/make.py FOLDER

FOLDER holds {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz as published by the authors of
Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist). The same files give the same
subset every time: 1,000 train and 200 test images of each of the 10 classes.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

SEED = 0
PER_CLASS = {"train": 1000, "t10k": 200}


def read_idx(path: Path) -> np.ndarray:
  """Reads one gzipped idx file of unsigned bytes, u8[...]."""
  data = gzip.decompress(path.read_bytes())
  kind, rank = data[2], data[3]
  if data[:2] != b"\0\0" or kind != 8:
    raise ValueError(f"{path} is no idx file of unsigned bytes: it starts with {data[:4]!r}")
  shape = np.frombuffer(data, ">i4", count=rank, offset=4)
  return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def balanced(labels: np.ndarray, *, per_class: int, seed: int) -> np.ndarray:
  """Indices of `per_class` random examples of every class, in their original order, i64[n]."""
  rng = np.random.default_rng(seed)
  chosen = [
    rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in np.unique(labels)
  ]
  return np.sort(np.concatenate(chosen))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=Path, help="where the four original .gz files lie")
  folder = parser.parse_args().folder
  arrays = {}
  for split, name in (("train", "train"), ("t10k", "test")):
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    index = balanced(labels, per_class=PER_CLASS[split], seed=SEED)
    arrays[f"{name}_images"], arrays[f"{name}_labels"] = images[index], labels[index]
  out = Path(__file__).parent / "fashion_mnist_12k.npz"
  np.savez_compressed(out, **arrays)
  print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
  main()
