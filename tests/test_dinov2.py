"""DINOv2's wiring against loops over crops and patches: who is compared with whom, and carried."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax import config as config_lib
from jepax.data.augment import Augment
from jepax.data.resample import crop_resize
from jepax.data.views import MultiCrop
from jepax.masks.tokens import TokenSet
from jepax.methods import dinov2
from jepax.models.positions import interpolate
from jepax.models.vit import ViT

BATCH, SIZE = 4, 8
RUN = config_lib.Run(size=SIZE, channels=1, mean=(0.5,), std=(0.25,), steps=20)
SETTINGS = dict(
  encoder=dict(variant="tiny", patch=2, width=16, depth=1, heads=2, mlp_width=16, registers=1),
  head=dict(prototypes=6, hidden=8, bottleneck=4),
  views=dict(crop_scale=(0.4, 1.0), flip=0.5),
  local=dict(crop_scale=(0.1, 0.4), size=4),
  local_views=2,
  masks=dict(ratio=(0.2, 0.5)),
  momentum=(0.9, 1.0),
)
TIED = {}
UNTIED = dict(
  ibot_head=dict(prototypes=5),
  centering="sinkhorn",
  gram=dict(weight=2.0, start=0.25, every=0.2, copies=2),
)


def softmax(x: np.ndarray) -> np.ndarray:
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def sinkhorn(x: np.ndarray, temperature: float) -> np.ndarray:
  q = np.exp((x - x.max()) / temperature)
  for _ in range(3):
    q = q / q.sum(0)
    q = q / q.sum(1, keepdims=True)
  return q


def cross_entropy(t: np.ndarray, s: np.ndarray) -> float:
  return float(-(t * np.log(softmax(s / 0.1))).sum())


def koleo(x: np.ndarray) -> float:
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  gaps = [min(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i) for i, a in enumerate(x)]
  return float(-np.log(gaps).mean())


def gram(x: np.ndarray, y: np.ndarray) -> float:
  x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
  return float(((x @ x.T - y @ y.T) ** 2).mean())


def parts(method, params, carry, batch, key) -> dict:
  """Outputs in float64, crop by crop: encoder and heads as they are, all else by hand."""
  view_key, mask_key, _ = jax.random.split(key, 3)
  views = jax.jit(method.draw_views)(view_key, batch)
  targets = jax.jit(method.hide)(mask_key, batch).targets
  hidden = np.zeros((BATCH, 2, 16), bool)
  for b, v, k in np.argwhere(np.asarray(targets.valid)):
    hidden[b, v, targets.index[b, v, k]] = True

  @jax.jit
  def encode(weights, images, hidden=None):
    return method.encoder.apply({"params": weights}, images, hidden=hidden)

  wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
  dino = jax.jit(method.dino_head.apply)
  head = lambda p, x: wide(dino({"params": p["dino_head"]}, x))  # noqa: E731
  own = method.ibot_head or method.dino_head
  name = "ibot_head" if method.ibot_head else "dino_head"
  ibot = lambda p, x: wide(jax.jit(own.apply)({"params": p[name]}, x))  # noqa: E731
  teacher = np.stack([encode(carry["target"]["encoder"], v) for v in views[:2]], 1)
  student = [encode(params["encoder"], views[i], jnp.asarray(hidden[:, i])) for i in (0, 1)]
  student, local = np.stack(student, 1), [encode(params["encoder"], v) for v in views[2:]]
  found = dict(
    hidden=hidden,
    teacher_class=head(carry["target"], teacher[:, :, 0]),
    teacher_patch=ibot(carry["target"], teacher[:, :, 2:]),
    student_class=head(params, np.concatenate([student[:, :, 0], np.stack(local, 1)[:, :, 0]], 1)),
    student_patch=ibot(params, student[:, :, 2:]),
    student=wide(student),
  )
  if method.gram:
    found["gram"] = wide(np.stack([encode(carry["gram"], v) for v in views[:2]], 1))
  return found


def slow_terms(method, carry, out: dict, temperature: float) -> dict[str, float]:
  """All terms, before their weights."""
  rows = out["teacher_patch"][out["hidden"]]
  if method.centering == "sinkhorn":
    classes = sinkhorn(out["teacher_class"].reshape(2 * BATCH, -1), temperature)
    patches = sinkhorn(rows, temperature)
  else:
    center = carry["center"]
    classes = softmax((out["teacher_class"] - np.asarray(center["dino"])) / temperature)
    patches = softmax((rows - np.asarray(center["ibot"])) / temperature)
  classes = classes.reshape(BATCH, 2, -1)
  pairs = [
    cross_entropy(classes[b, t], out["student_class"][b, s])
    for b in range(BATCH)
    for t in range(2)
    for s in range(4)
    if s != t
  ]
  count = out["hidden"].sum(-1)
  ibot = sum(
    cross_entropy(t, s) / count[b, v] / (2 * BATCH)
    for t, s, (b, v, _) in zip(
      patches, out["student_patch"][out["hidden"]], np.argwhere(out["hidden"]), strict=True
    )
  )
  terms = dict(
    dino=np.mean(pairs), ibot=ibot, koleo=sum(koleo(out["student"][:, v, 0]) for v in (0, 1))
  )
  if method.gram:
    pairs = np.ndindex(BATCH, 2)
    terms["gram"] = np.mean(
      [gram(out["student"][b, v, 2:], out["gram"][b, v, 2:]) for b, v in pairs]
    )
  return terms


def prepare(changes):
  method = dinov2.build(RUN, **SETTINGS, **changes)
  images = np.random.default_rng(0).integers(0, 256, (BATCH, SIZE, SIZE, 1), dtype=np.uint8)
  batch = {"image": jnp.asarray(images)}
  params, carry = jax.jit(method.init)(jax.random.key(0), batch)
  rng = np.random.default_rng(1)
  apart = lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
  return method, jax.tree.map(apart, params), jax.tree.map(apart, carry), batch


@pytest.mark.parametrize("changes", [TIED, UNTIED], ids=["tied, centers", "untied, sinkhorn, gram"])
def test_loss_is_the_slow_one(changes):
  method, params, carry, batch = prepare(changes)
  assert ("ibot_head" in params) == ("ibot_head" in changes)
  key, step = jax.random.key(3), 9
  out = parts(method, params, carry, batch, key)
  assert (out["hidden"].any(-1).sum(1) == 1).all()
  terms = slow_terms(method, carry, out, float(method.temperature(step)))
  compiled = jax.jit(method.loss)
  loss, found = compiled(params, carry, batch, key, step)
  for name, value in terms.items():
    np.testing.assert_allclose(found.metrics[f"loss/{name}"], value, rtol=1e-3, err_msg=name)
  weights = dict(dino=1.0, ibot=1.0, koleo=0.1, gram=2.0)
  np.testing.assert_allclose(loss, sum(weights[n] * v for n, v in terms.items()), rtol=1e-3)
  if method.centering == "softmax":  # of the next step, by hand
    for name, rows in (
      ("dino", out["teacher_class"].reshape(-1, 6)),
      ("ibot", out["teacher_patch"][out["hidden"]]),
    ):
      expected = 0.9 * np.asarray(carry["center"][name]) + 0.1 * rows.mean(0)
      np.testing.assert_allclose(found.carry["center"][name], expected, rtol=1e-3, atol=1e-5)
  else:
    early, before = compiled(params, carry, batch, key, 4)  # before Gram's start at 5
    later = method.temperature(4) != method.temperature(step)
    assert later and early != loss
    assert before.metrics["loss/gram"] == 0


def test_teacher_moves_with_its_heads_and_gram_is_copied_when_due():
  method, params, carry, _ = prepare(UNTIED)
  before = carry
  steps = {}
  update = jax.jit(method.update)
  for step in range(20):
    after = update(params, before, step)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), after["gram"], before["gram"])
    if not all(jax.tree.leaves(same)):
      steps[step] = jax.tree.map(
        np.testing.assert_array_equal, after["gram"], after["target"]["encoder"]
      )
    before = after
  assert list(steps) == [4, 8]  # so that steps 5 and 9 see the copies, and no third comes
  momentum = float(method.momentum(0))
  first = update(params, carry, 0)["target"]
  for part in ("encoder", "dino_head", "ibot_head"):
    for old, new, moved in zip(
      *(jax.tree.leaves(x[part]) for x in (carry["target"], params, first)), strict=True
    ):
      np.testing.assert_allclose(moved, momentum * old + (1 - momentum) * new, rtol=1e-5, atol=1e-6)


def test_busiest_takes_the_masked_crops():
  sets = TokenSet(
    index=jnp.asarray([[[0, 0], [3, 1]], [[2, 0], [0, 0]], [[0, 0], [0, 0]]]),
    valid=jnp.asarray([[[0, 0], [1, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]], bool),
  )
  found = dinov2.busiest(sets, count=1, patches=4)
  np.testing.assert_array_equal(found.index[:, 0], [[7, 5], [2, 0], [0, 0]])
  np.testing.assert_array_equal(found.valid[:, 0], [[1, 1], [1, 0], [0, 0]])


def test_pooled_is_the_class_token_and_registers_are_left_out():
  method, params, carry, batch = prepare(TIED)

  @jax.jit
  def both(params, carry, batch):
    clean = method.views.clean(batch["image"])
    whole = method.encoder.apply({"params": carry["target"]["encoder"]}, clean)
    return method.encode(params, carry, batch, branch="target"), whole

  features, whole = both(params, carry, batch)
  np.testing.assert_array_equal(features.pooled, whole[:, 0])
  np.testing.assert_array_equal(features.tokens, whole[:, 2:])


@pytest.mark.parametrize("antialias", [False, True])
def test_learned_positions_are_interpolated_for_local_crops(antialias):
  fields = dict(patch=2, width=8, depth=1, heads=2, class_token=True, position="learned")
  module = ViT(**fields, grid=(4, 4), resize="antialias" if antialias else "bicubic")
  images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 1)), jnp.float32)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
  table = np.asarray(params["position"])
  small = interpolate(table[1:], old=(4, 4), new=(2, 3), antialias=antialias)
  there = {**params, "position": np.concatenate([table[:1], small])}
  expected = jax.jit(ViT(**fields, grid=(2, 3)).apply)({"params": there}, images)
  # float32 against a table summed in float64.
  found = jax.jit(module.apply)({"params": params}, images)
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_crops_have_their_sizes_and_are_crops():
  crop = Augment(mean=(0.0,), std=(1.0,), crop_scale=(0.1, 0.4), size=3)
  whole = Augment(mean=(0.0,), std=(1.0,))
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), dtype=np.uint8)
  keys = jax.random.split(jax.random.key(0), (3, 2))
  views = jax.jit(MultiCrop((whole, crop, crop)))(keys, jnp.asarray(images))
  assert [v.shape[1] for v in views] == [8, 3, 3]
  np.testing.assert_allclose(views[0], images / 255, rtol=1e-6)
  box = crop._box(jax.random.fold_in(keys[2, 1], 0), 8, 8)
  assert 0.1 * 64 <= (box[2] - box[0]) * (box[3] - box[1]) <= 0.4 * 64 + 1e-3
  resize = jax.jit(functools.partial(crop_resize, height=3, width=3))
  expected = resize(jnp.asarray(images[1], jnp.float32) / 255, box)
  np.testing.assert_allclose(views[2][1], expected, rtol=1e-5)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(centering="sinkhron"), "method.centering='sinkhron' is unknown; did you mean 'sinkhorn'"),
    (dict(momentum=(1.0, 0.9)), "first <= last"),
    (dict(temperature=(0.0, 0.07)), "must be above 0"),
    (dict(local_views=-1), "local_views=-1 must not be negative"),
    (dict(local=dict(size=5)), "does not divide"),
    (dict(koleo_weight=-1.0), "method.koleo_weight=-1.0 must not be negative"),
    (dict(koleo_group=0), "koleo_group=0 be 2 or more"),
    (dict(center_momentum=2.0), "center_momentum=2.0 must lie in"),
    (dict(encoder=dict(variant="tiny")), "method.encoder.patch must be given"),
    (
      dict(gram=dict(weight=1.0, start=2.0, every=0.1, copies=1)),
      "method.gram.start=2.0 must be a share of the run",
    ),
    (
      dict(gram=dict(weight=-1.0, start=0.5, every=0.1, copies=1)),
      "method.gram: weight and start must not be negative",
    ),
    (dict(second=dict(size=4)), "method.second.size=4 must be that of the first view, 8"),
    (dict(gram=dict(weight=1.0)), "method.gram lacks"),
    (dict(head=dict(last="weightnorm")), "method.head: last='weightnorm' is unknown"),
  ],
)
def test_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    dinov2.build(RUN, **{**SETTINGS, **changes})
