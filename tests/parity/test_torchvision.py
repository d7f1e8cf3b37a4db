"""Convolutional encoders against torchvision's, with random weights and statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightly")  # and so torchvision

from parity import light  # noqa: E402

from jepax.convert import torchvision  # noqa: E402
from jepax.models import encoder as encoders  # noqa: E402
from jepax.models.convnext import convnext  # noqa: E402
from jepax.models.resnet import resnet  # noqa: E402

BUILD = {"resnet18": resnet, "resnet50": resnet, "convnext_tiny": convnext}
SIDE = 64
models = light.vision().models


def images(count: int) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(count, 3, SIDE, SIDE)).astype(np.float32)


def peer(name: str):
  """A torchvision model whose biases, norms and running statistics are none of their first ones."""
  torch.manual_seed(0)
  model = getattr(models, name)(weights=None)
  with torch.no_grad():
    for key, tensor in model.state_dict().items():
      if key.endswith(("running_var", "layer_scale")):
        tensor.uniform_(0.5, 1.5)
      elif tensor.ndim == 1:  # biases, scales, running means
        tensor.add_(0.2 * torch.randn_like(tensor))
  return model


def ours(model, name: str):
  module = BUILD[name](name)
  return module, jax.tree.map(jnp.asarray, torchvision.weights(module, model.state_dict()))


def last_map(model, name: str, x: np.ndarray) -> np.ndarray:
  """torchvision's map before pooling, as tokens [b n d]."""
  layers = [model.features] if name == "convnext_tiny" else list(model.children())[:-2]
  with torch.no_grad():
    return torch.nn.Sequential(*layers)(torch.from_numpy(x)).flatten(2).transpose(1, 2).numpy()


def close(found, expected, *, relative: float) -> None:
  """In units of the largest expected value: single cells may be near zero."""
  np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.mark.parametrize("name", sorted(BUILD))
def test_evaluation(name):
  model = peer(name).eval()
  module, weights = ours(model, name)
  x = images(2)
  found = jax.jit(encoders.apply, static_argnums=0)(module, weights, x.transpose(0, 2, 3, 1))
  # Float32 sums of some thousand products in another order, through up to 53 layers.
  close(found, last_map(model, name, x), relative=1e-5)


def test_training_moves_statistics_as_torch():
  model = peer("resnet18")
  module, weights = ours(model, "resnet18")
  x = images(4)
  expected = last_map(model.train(), "resnet18", x)
  train = jax.jit(encoders.train, static_argnums=0)
  tokens, statistics = train(module, weights, x.transpose(0, 2, 3, 1))
  # Divided by the deviation of 16 values a channel in the last stage, roundings grow.
  close(tokens, expected, relative=2e-5)
  _, moved = encoders.split(torchvision.weights(module, model.state_dict()))
  jax.tree.map(lambda a, b: close(a, b, relative=1e-5), statistics, moved)
  before = encoders.split(weights)[1]
  assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, moved)), strict=True))


def test_a_state_that_does_not_fit():
  model = peer("resnet18")
  with pytest.raises(ValueError, match=r"missing layer1\.0\.conv3\.weight"):
    torchvision.weights(resnet("resnet50"), model.state_dict())
