"""Losses and their gradients against lightly's, live: pip install '.[parity]'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightly")

from parity import light  # noqa: E402

from jepax import losses  # noqa: E402
from jepax.methods.barlow_twins import redundancy  # noqa: E402
from jepax.methods.lejepa import CONVENTIONS, invariance  # noqa: E402
from jepax.methods.simclr import nt_xent  # noqa: E402
from jepax.models.heads import BatchNorm  # noqa: E402
from jepax.sigreg import sigreg  # noqa: E402

lightly, _, _ = light.load()
from lightly.loss import lejepa_loss  # noqa: E402

# Rows and features: more of the one, then of the other, since Gram matrices are of the smaller.
SHAPES = [(16, 6), (6, 16)]


def pair(shape) -> tuple[np.ndarray, np.ndarray]:
  """Two correlated views, so that no term is near zero."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape)
  return tuple((x + 0.5 * rng.normal(size=shape)).astype(np.float32) for _ in range(2))


def agree(ours, theirs, *arrays: np.ndarray, rtol: float = 1e-5):
  """Value and gradient by every argument: ours in float32, the peer's in float64."""
  value, grads = jax.value_and_grad(ours, argnums=tuple(range(len(arrays))))(*arrays)
  tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
  expected = theirs(*tensors)
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=rtol)
  for grad, tensor in zip(grads, tensors, strict=True):
    # Elements of a gradient near zero are differences of larger ones.
    want = tensor.grad.numpy()
    np.testing.assert_allclose(grad, want, rtol=10 * rtol, atol=10 * rtol * np.abs(want).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_barlow_twins(shape):
  def ours(x, y):
    on, off = redundancy(*(BatchNorm(affine=False).apply({}, z) for z in (x, y)))
    return on + 5e-3 * off

  agree(ours, lightly.BarlowTwinsLoss(lambda_param=5e-3), *pair(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_vicreg(shape):
  def ours(x, y):
    variance = (losses.variance_hinge(x) + losses.variance_hinge(y)) / 2
    covariance = losses.covariance_penalty(x) + losses.covariance_penalty(y)
    return 25 * losses.squared(x, y).mean() + 25 * variance + covariance

  x, y = pair(shape)
  theirs = lightly.VICRegLoss(lambda_param=25, mu_param=25, nu_param=1, eps=1e-4)
  agree(ours, theirs, 0.5 * x, 0.5 * y)  # under a standard deviation of 1, where the hinge acts


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_nt_xent(shape, temperature):
  theirs = lightly.NTXentLoss(temperature=temperature, memory_bank_size=0)
  agree(lambda x, y: nt_xent(x, y, temperature=temperature), theirs, *pair(shape))


def test_info_nce_is_cross_entropy():
  def theirs(x, y):
    x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
    return torch.nn.functional.cross_entropy(x @ y.T / 0.2, torch.arange(len(x)))

  agree(lambda x, y: losses.info_nce(x, y, temperature=0.2), theirs, *pair((16, 6)))


def test_negative_cosine():
  theirs = lightly.NegativeCosineSimilarity()
  agree(lambda x, y: -losses.cosine(x, y).mean(), theirs, *pair((16, 6)))


@pytest.mark.parametrize("knots, t_max", [(17, 3.0), (9, 5.0)])
def test_sigreg(monkeypatch, knots, t_max):
  """On the directions that the peer draws."""
  drawn = []
  randn = torch.randn

  def remember(*arguments, **keywords):
    drawn.append(randn(*arguments, **{**keywords, "dtype": torch.float64}))
    return drawn[-1]

  monkeypatch.setattr(torch, "randn", remember)
  z = np.stack(pair((16, 6)))  # [v b d]
  statistic = lejepa_loss.SIGReg(knots=knots, t_max=t_max, num_vectors=8)
  expected = statistic(torch.tensor(z, dtype=torch.float64)).item()
  (a,) = (x.numpy() for x in drawn)
  a = a if a.shape[0] == 6 else a.T
  a = a / np.linalg.norm(a, axis=0)
  found = sigreg(z, jnp.asarray(a, jnp.float32), t_max=t_max, nodes=knots)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_invariance_of_lejepa():
  z = np.stack([*pair((16, 6)), *pair((16, 6))]) * np.arange(1, 5)[:, None, None]
  z = z.astype(np.float32)

  def theirs(z):
    return lejepa_loss.lejepa_invariance_loss(all_proj=z, global_proj=z[:2])

  agree(lambda z: invariance(z, convention=CONVENTIONS["paper"], global_views=2), theirs, z)
