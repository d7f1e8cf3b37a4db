"""SIGReg beside the package `lejepa`: numbers captured by `capture_lejepa.py`."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from jepax.sigreg import epps_pulley, sigreg

GOLDEN = dict(np.load(Path(__file__).with_name("golden_lejepa.npz")))


@pytest.mark.parametrize("t_max, nodes", [(3.0, 17), (5.0, 9)])
def test_statistic_and_gradient(t_max, nodes):
  """To float32: the package sums 24 samples and up to 17 nodes, in another order."""
  z, directions = GOLDEN["z"], GOLDEN["directions"]
  settings = dict(t_max=t_max, nodes=nodes)
  slices = epps_pulley(z @ directions, **settings)  # [2 8]
  np.testing.assert_allclose(slices, GOLDEN[f"statistics/{nodes}"], rtol=2e-5)
  mean, gradient = jax.value_and_grad(lambda z: sigreg(z, directions, **settings))(z)
  np.testing.assert_allclose(mean, GOLDEN[f"statistics/{nodes}"].mean(), rtol=1e-5)
  expected = GOLDEN[f"gradient/{nodes}"]
  np.testing.assert_allclose(gradient, expected, atol=2e-5 * np.abs(expected).max())
