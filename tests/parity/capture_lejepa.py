"""Captures SIGReg's statistic from the package `lejepa`, which is not part of this repository.

  git clone https://github.com/rbalestr-lab/lejepa PACKAGE
  pip install torch==2.13.0 scipy
  python tests/parity/capture_lejepa.py --package=PACKAGE --out=tests/parity/golden_lejepa.npz

The shipped file: commit eddffdd, torch 2.13.0 on a CPU, float32. Its licence forbids to ship its
code; what is stored are numbers that it computed from random ones.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch

SETTINGS = ((3.0, 17), (5.0, 9))  # t_max, nodes
SLICES = 8


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--package", required=True, help="a checkout of rbalestr-lab/lejepa")
  parser.add_argument("--out", required=True)
  options = parser.parse_args()
  sys.path.insert(0, options.package)
  import lejepa

  rng = np.random.default_rng(0)
  z = (rng.normal(size=(2, 24, 6)) * np.linspace(0.3, 2, 6) + 0.2).astype(np.float32)
  directions = torch.randn(6, SLICES, generator=torch.Generator().manual_seed(0))
  directions /= directions.norm(p=2, dim=0)  # what the package draws at its step 0
  arrays = {"z": z, "directions": directions.numpy()}
  for t_max, nodes in SETTINGS:
    univariate = lejepa.univariate.EppsPulley(t_max=t_max, n_points=nodes)
    x = torch.tensor(z, requires_grad=True)
    sliced = lejepa.multivariate.SlicingUnivariateTest(univariate, SLICES, reduction=None)
    statistics = sliced(x)
    statistics.mean().backward()
    arrays[f"statistics/{nodes}"] = statistics.detach().numpy()
    arrays[f"gradient/{nodes}"] = x.grad.numpy()
  np.savez(options.out, **arrays)


if __name__ == "__main__":
  main()
