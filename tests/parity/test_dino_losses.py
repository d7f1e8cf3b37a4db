"""DINOv2's losses and head against lightly: pip install '.[parity]'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightly")

from parity import light  # noqa: E402

from jepax import losses_dino  # noqa: E402
from jepax.models.heads import DinoHead  # noqa: E402

LOSS, SWAV, HEADS = light.load()
K, TEACHER, STUDENT = 11, 0.07, 0.1
RTOL = 2e-5  # float32 on both sides, logits divided by 0.07


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_dino_with_its_center_over_three_steps():
  peer = LOSS.DINOLoss(output_dim=K, teacher_temp=TEACHER, student_temp=STUDENT)
  center = jnp.zeros(K)
  for step in range(3):
    teacher, student = normal(6, 2, K, seed=step), normal(6, 10, K, seed=100 + step)
    x = torch.tensor(student, requires_grad=True)
    crops = lambda y: list(y.transpose(0, 1))  # noqa: E731
    wanted = peer(crops(torch.tensor(teacher)), crops(x), teacher_temp=TEACHER)
    wanted.backward()
    targets = losses_dino.softmax_centered(teacher, center, temperature=TEACHER)
    found, grad = jax.value_and_grad(lambda s, t=targets: losses_dino.dino(t, s))(student)
    np.testing.assert_allclose(found, wanted.item(), rtol=RTOL)
    np.testing.assert_allclose(grad, x.grad.numpy(), rtol=1e-3, atol=1e-6)
    center = losses_dino.moved_center(center, teacher)
    np.testing.assert_allclose(center, peer.center.numpy().ravel(), rtol=RTOL, atol=1e-7)


def test_ibot_with_its_center_over_three_steps():
  peer = LOSS.IBOTPatchLoss(output_dim=K, teacher_temp=TEACHER, student_temp=STUDENT)
  center = jnp.zeros(K)
  for step in range(3):
    rng = np.random.default_rng(step)
    mask = rng.random((4, 3, 3)) < np.array([0, 0.5, 0.3, 0.8])[:, None, None]  # one without
    teacher, student = normal(4, 9, K, seed=step), normal(4, 9, K, seed=100 + step)
    flat = mask.reshape(4, 9)
    x = torch.tensor(student[flat], requires_grad=True)
    wanted = peer(torch.tensor(teacher[flat]), x, torch.tensor(mask), teacher_temp=TEACHER)
    wanted.backward()
    targets = losses_dino.softmax_centered(teacher, center, temperature=TEACHER)
    loss = lambda s, t=targets, v=flat: losses_dino.ibot(  # noqa: E731
      t[:, None], s[:, None], v[:, None], crops=4
    )
    found, grad = jax.value_and_grad(loss)(student)
    np.testing.assert_allclose(found, wanted.item(), rtol=RTOL)
    np.testing.assert_allclose(grad[flat], x.grad.numpy(), rtol=1e-3, atol=1e-6)
    assert not np.any(grad[~flat])
    center = losses_dino.moved_center(center, teacher, valid=flat)
    np.testing.assert_allclose(center, peer.center.value.numpy().ravel(), rtol=RTOL, atol=1e-7)


def test_koleo():
  x = normal(16, 12)
  y = torch.tensor(x, requires_grad=True)
  wanted = LOSS.KoLeoLoss()(y)
  wanted.backward()
  found, grad = jax.value_and_grad(losses_dino.koleo)(x)
  np.testing.assert_allclose(found, wanted.item(), rtol=RTOL)
  np.testing.assert_allclose(grad, y.grad.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn(iterations):
  logits = 0.3 * normal(24, K)
  wanted = SWAV.sinkhorn(torch.tensor(logits).double(), iterations=iterations, epsilon=TEACHER)
  found = losses_dino.sinkhorn(logits, temperature=TEACHER, iterations=iterations)
  np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # lightly's use of torch
@pytest.mark.parametrize("last, peer", [("weight_norm", "DINOv2"), ("unit", "DINO")])
def test_head(last, peer):
  head = getattr(HEADS, f"{peer}ProjectionHead")(12, 10, 6, K).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, p in head.named_parameters():
      if not (last == "unit" and name.endswith("weight_g")):  # lightly keeps it at 1
        p.copy_(
          1.0 * (p.ndim > 1 and p.shape[-1] == 1) + 0.3 * torch.randn(p.shape, generator=generator)
        )
  weights = {name: p.detach().numpy() for name, p in head.named_parameters()}
  linear = [
    n.removesuffix(".weight") for n in weights if n.startswith("layers.") and ".weight" in n
  ]
  params = {
    ours: {"kernel": weights[f"{n}.weight"].T, "bias": weights[f"{n}.bias"]}
    for ours, n in zip(("dense0", "dense1", "narrow"), linear, strict=True)
  }
  params["prototypes"] = {"kernel": weights["last_layer.weight_v"].T}
  if last == "weight_norm":
    params["prototypes"]["gain"] = weights["last_layer.weight_g"].ravel()
  x = normal(5, 12)
  with torch.no_grad():
    wanted = head(torch.tensor(x)).numpy()
  found = DinoHead(prototypes=K, hidden=10, bottleneck=6, last=last).apply({"params": params}, x)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
