"""Schedules and optimizers against closed forms and slow numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepax import optim
from jepax.config import base
from jepax.models.transformer import Transformer

STEPS, WARMUP = 50, 8  # T and Wm of the reference's schedulers, warm-up included in T


def section(**changes):
  config = base().optim
  config.update(lr=1e-3, start_lr=2e-4, final_lr=1e-6, weight_decay=0.04, final_weight_decay=0.4)
  config.update(changes)
  return config


def params() -> dict:
  """One leaf of every kind; a scanned stack has biases and scales of two axes."""
  rng = np.random.default_rng(0)
  shapes = {
    "mask_token": (1, 1, 4),
    "dense": {"kernel": (3, 4), "bias": (4,)},
    "norm": {"scale": (4,), "bias": (4,)},
    "blocks": {"qkv": {"kernel": (2, 3, 4), "bias": (2, 4)}, "norm": {"scale": (2, 3)}},
  }
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


DECAYED = {"['mask_token']", "['dense']['kernel']", "['blocks']['qkv']['kernel']"}


def gradients(step: int) -> dict:
  rng = np.random.default_rng(100 + step)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params())


def flat(tree) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in leaves}


def trained(optimizer: optim.Optimizer, steps: int) -> dict[str, np.ndarray]:
  """Parameters after some updates of the chain as it is used."""
  state, moved = optimizer.tx.init(params()), params()
  update = jax.jit(optimizer.tx.update)
  for step in range(steps):
    updates, state = update(gradients(step), state, moved)
    moved = jax.tree.map(jnp.add, moved, updates)
  return flat(moved)


# --- schedules ------------------------------------------------------------------------------


def reference_lr(s: int) -> float:
  """The reference's warm-up and cosine, its counter starting at 1."""
  start, peak, final = 2e-4, 1e-3, 1e-6
  if s < WARMUP:
    return start + s / WARMUP * (peak - start)
  progress = (s - WARMUP) / (STEPS - WARMUP)
  return max(final, final + (peak - final) * 0.5 * (1 + np.cos(np.pi * progress)))


def reference_decay(s: int) -> float:
  return min(0.4, 0.4 + (0.04 - 0.4) * 0.5 * (1 + np.cos(np.pi * s / STEPS)))


@pytest.mark.parametrize("s", [1, WARMUP - 1, WARMUP, WARMUP + 1, 25, STEPS - 1, STEPS])
def test_schedules_are_those_of_the_reference(s):
  schedules = optim.build(section(), steps=STEPS, warmup=WARMUP).schedules
  # Update number k, counted from 0, uses s = k + 1. rtol: the cosine in float32.
  lr = schedules["schedule/learning_rate"](s - 1)
  np.testing.assert_allclose(lr, reference_lr(s), rtol=1e-5, atol=1e-10)
  decay = schedules["schedule/weight_decay"](jnp.asarray(s - 1))
  np.testing.assert_allclose(decay, reference_decay(s), rtol=1e-5)


def test_schedules_stay_at_their_end():
  assert optim.linear(0.9, 1.0, steps=10)(25) == 1.0
  assert optim.cosine(1.0, 0.5, steps=10)(25) == 0.5
  rate = optim.warmup_cosine(0.0, 1.0, 0.25, warmup=2, steps=10)
  np.testing.assert_allclose([rate(10), rate(99)], 0.25, rtol=1e-6)


def test_linear_is_the_momentum_of_the_reference():
  momentum = optim.linear(0.996, 1.0, steps=STEPS)
  for k in (0, 1, 17, STEPS - 1):
    expected = 0.996 + k * (1.0 - 0.996) / STEPS
    np.testing.assert_allclose(momentum(k), expected, rtol=1e-7)


def test_no_warmup_starts_at_the_peak():
  rate = optim.warmup_cosine(0.5, 1.0, 0.0, warmup=0, steps=10)
  assert rate(0) == 1.0 and 0 < rate(9) < rate(1) < 1


def test_warmup_of_the_whole_run():
  rate = optim.warmup_cosine(0.0, 1.0, 0.0, warmup=10, steps=10)
  np.testing.assert_allclose([rate(0), rate(5), rate(9), rate(10)], [0, 0.5, 0.9, 1.0], rtol=1e-6)


# --- optimizers -----------------------------------------------------------------------------


def test_decayed_are_all_but_biases_and_scales():
  marks = optim.decayed(params())
  assert {path for path, mark in flat(marks).items() if mark} == DECAYED


@pytest.mark.parametrize("scan", [False, True])
def test_decayed_in_a_real_stack(scan):
  model = Transformer(width=4, depth=2, heads=1, scan=scan)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2, 4)))["params"]
  for path, mark in flat(optim.decayed(shapes)).items():
    assert mark == path.endswith("['kernel']"), path


def test_adamw_is_torch_adamw():
  found = trained(optim.build(section(), steps=STEPS, warmup=WARMUP), 5)
  for path, p in flat(params()).items():
    m = v = np.zeros_like(p)
    for k in range(5):
      g, lr = flat(gradients(k))[path], reference_lr(k + 1)
      if path in DECAYED:
        p = p * (1 - lr * reference_decay(k + 1))
      m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
      m_hat, v_hat = m / (1 - 0.9 ** (k + 1)), v / (1 - 0.999 ** (k + 1))
      p = p - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
    # Five updates of about 1e-3 in float32 on values of order 1.
    np.testing.assert_allclose(found[path], p, atol=1e-6, err_msg=path)


def lars(p: np.ndarray, grads: list[np.ndarray], *, is_decayed: bool) -> np.ndarray:
  """One tensor by the rule of VICReg, MoCo v3 and MAE's probe: momentum, then the rate."""
  velocity = np.zeros_like(p)
  for k, g in enumerate(grads):
    if is_decayed:
      g = g + reference_decay(k + 1) * p
      g = g * 1e-3 * np.linalg.norm(p) / np.linalg.norm(g)
    velocity = 0.9 * velocity + g
    p = p - 1000 * reference_lr(k + 1) * velocity
  return p


def test_lars_under_a_changing_rate():
  rates = dict(lr=1.0, start_lr=0.2, final_lr=1e-3)  # 1000 times those of `reference_lr`
  found = trained(optim.build(section(name="lars", **rates), steps=STEPS, warmup=WARMUP), 6)
  grads = [flat(gradients(k)) for k in range(6)]
  for path, p in flat(params()).items():
    layers = range(2) if "blocks" in path else [...]  # a layer at a time, as if unrolled
    for i in layers:
      expected = lars(p[i], [g[path][i] for g in grads], is_decayed=path in DECAYED)
      # Moves of 1e-3 and more, in float32 on values of order 1.
      np.testing.assert_allclose(found[path][i], expected, atol=2e-6, rtol=2e-6, err_msg=path)


def test_sgd_is_torchs():
  """Decay joins the gradient, of every parameter, before the momentum; the rate comes last."""
  rates = dict(lr=0.1, start_lr=0.02, final_lr=1e-4)  # 100 times those of `reference_lr`
  found = trained(optim.build(section(name="sgd", **rates), steps=STEPS, warmup=WARMUP), 6)
  grads = [flat(gradients(k)) for k in range(6)]
  for path, p in flat(params()).items():
    velocity = np.zeros_like(p)
    for k, g in enumerate(grads):
      velocity = 0.9 * velocity + g[path] + reference_decay(k + 1) * p
      p = p - 100 * reference_lr(k + 1) * velocity
    # Moves of 0.1, in float32 on values of order 1.
    np.testing.assert_allclose(found[path], p, atol=2e-6, rtol=2e-6, err_msg=path)


def test_bias_scale_is_of_biases_and_norms_alone():
  settings = dict(name="lars", weight_decay=0.0, final_weight_decay=0.0)
  plain, scaled = (
    trained(optim.build(section(bias_scale=share, **settings), steps=4, warmup=0), 1)
    for share in (1.0, 0.25)
  )
  for path, start in flat(params()).items():
    share = 1.0 if path in DECAYED else 0.25
    np.testing.assert_allclose(
      scaled[path] - start, share * (plain[path] - start), atol=3e-7, rtol=1e-5
    )  # differences of float32 values of order 1


def test_trust_ratio_passes_what_it_cannot_scale():
  tx = optim.trust_ratio(0.1)
  tree = {
    "zero": {"kernel": jnp.zeros(3)},
    "still": {"kernel": jnp.ones(3)},
    "moved": {"kernel": jnp.asarray([3.0, 4.0, 0.0]), "bias": jnp.ones(3)},
  }
  update = {
    "zero": {"kernel": jnp.ones(3)},
    "still": {"kernel": jnp.zeros(3)},
    "moved": {"kernel": jnp.asarray([0.0, 0.0, 2.0]), "bias": jnp.full(3, 7.0)},
  }
  scaled, _ = tx.update(update, tx.init(tree), tree)
  np.testing.assert_array_equal(scaled["zero"]["kernel"], 1.0)
  np.testing.assert_array_equal(scaled["still"]["kernel"], 0.0)
  np.testing.assert_array_equal(scaled["moved"]["bias"], 7.0)
  np.testing.assert_allclose(scaled["moved"]["kernel"], [0, 0, 0.5], rtol=1e-6)  # 0.1 * 5


def test_clip_is_of_the_global_norm():
  free = optim.build(section(name="lars", lr=0.1), steps=4, warmup=0)
  clipped = optim.build(section(name="lars", lr=0.1, clip=0.5), steps=4, warmup=0)
  norm = np.sqrt(sum((g**2).sum() for g in flat(gradients(0)).values()))
  free_bias, bias = (
    trained(o, 1)["['dense']['bias']"] - flat(params())["['dense']['bias']"]
    for o in (free, clipped)
  )
  assert norm > 0.5
  np.testing.assert_allclose(bias, free_bias * 0.5 / norm, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"name": "adam"}, r"optim.name='adam' is unknown; did you mean 'adamw'.*\['adamw', .*'sgd'\]"),
    ({"lr": -1.0}, r"optim.lr=-1.0 must not be negative"),
    ({"lr": float("nan")}, r"optim.lr=nan must not be negative"),
    ({"final_weight_decay": -0.1}, r"optim.final_weight_decay"),
    ({"clip": -1.0}, r"optim.clip=-1.0"),
    ({"b1": 1.0}, r"optim.b1=1.0 must lie in \[0, 1\)"),
    ({"b2": -0.5}, r"optim.b2"),
    ({"clip_parts": True}, "optim.clip_parts needs a limit; set optim.clip"),
    ({"warmup": "2 epochs"}, r"optim.warmup='2 epochs' is 11 steps but the run only 10; shorten"),
  ],
)
def test_errors(changes, message):
  with pytest.raises(ValueError, match=message):
    optim.build(section(**changes), steps=10, warmup=11 if "warmup" in changes else 1)


def test_an_unscheduled_part_keeps_its_learning_rate():
  """SimSiam's predictor: the update is the other part's times lr / lr(step)."""
  whole = {"encoder": params(), "predictor": params()}
  grads = {"encoder": gradients(0), "predictor": gradients(0)}
  optimizer = optim.build(section(unscheduled="predictor"), steps=STEPS, warmup=WARMUP)
  state = optimizer.tx.init(whole)
  rate = optimizer.schedules["schedule/learning_rate"]
  for step in range(3):
    updates, state = optimizer.tx.update(grads, state, whole)
    ratio = 1e-3 / float(rate(step))
    for name, update in flat(updates["encoder"]).items():
      np.testing.assert_allclose(flat(updates["predictor"])[name], ratio * update, rtol=1e-5)


def test_an_unscheduled_part_has_to_exist():
  optimizer = optim.build(section(unscheduled="predicter"), steps=STEPS, warmup=WARMUP)
  with pytest.raises(ValueError, match="did you mean 'predictor'"):
    optimizer.tx.init({"encoder": params(), "predictor": params()})


# --- parts and layers -----------------------------------------------------------------------


def encoder_params(scan: bool) -> dict:
  kernel = np.ones((2, 3), np.float32)
  block = {"fc1": {"kernel": kernel}}
  stack = {"blocks": {"fc1": {"kernel": np.stack([kernel, kernel])}}}
  return {
    "encoder": {
      "embed": {"kernel": kernel},
      "class_token": kernel,
      "norm": {"scale": kernel},
      "transformer": stack if scan else {"block0": block, "block1": block},
    },
    "dino_head": {"dense0": {"kernel": kernel}, "prototypes": {"kernel": kernel}},
  }


@pytest.mark.parametrize("scan", [False, True])
def test_layer_decay_embed_scale_and_freeze_reach_the_update(scan):
  """Plain steps of size lr: what remains of 1 is each leaf's share of the rate."""
  c = section(
    name="lars", lr=1e-3, start_lr=1e-3, final_lr=1e-3, weight_decay=0.0, final_weight_decay=0.0,
    b1=0.0, layer_decay=0.5, embed_scale=0.2,
  )  # fmt: skip
  tx = optim.build(c, steps=9, warmup=0, freeze=2).tx
  tree = encoder_params(scan)
  state, moves = tx.init(tree), []
  for _ in range(3):
    updates, state = jax.jit(tx.update)(tree, state, tree)
    moves.append(flat(updates))
  share = {path: float(-x.ravel()[0]) / 1e-6 for path, x in moves[-1].items()}
  last = {path: float(-x.ravel()[-1]) / 1e-6 for path, x in moves[-1].items()}
  blocks = "['encoder']['transformer']"
  if scan:
    found = [f(f"{blocks}['blocks']['fc1']['kernel']") for f in (share.get, last.get)]
  else:
    found = [share[f"{blocks}['block{i}']['fc1']['kernel']"] for i in (0, 1)]
  np.testing.assert_allclose(found, [0.25, 0.5], rtol=1e-4)
  np.testing.assert_allclose(share["['encoder']['embed']['kernel']"], 0.125 * 0.2, rtol=1e-4)
  np.testing.assert_allclose(share["['encoder']['class_token']"], 0.125, rtol=1e-4)
  np.testing.assert_allclose(share["['dino_head']['dense0']['kernel']"], 1.0, rtol=1e-4)
  for k, move in enumerate(moves):
    moved = np.any(move["['dino_head']['prototypes']['kernel']"])
    assert moved == (k >= 2) and np.any(move["['dino_head']['dense0']['kernel']"])


def test_frozen_parameters_never_move():
  c = section(frozen="encoder/transformer/block1, dino_head/prototypes/kernel")
  tx, tree = optim.build(c, steps=9, warmup=0).tx, encoder_params(scan=False)
  updates, _ = jax.jit(tx.update)(tree, tx.init(tree), tree)
  still = {path for path, x in flat(updates).items() if not x.any()}
  under = "['encoder']['transformer']['block1']"
  wanted = {path for path in flat(tree) if path.startswith(under)}
  assert wanted and still == {*wanted, "['dino_head']['prototypes']['kernel']"}


@pytest.mark.parametrize(
  ("paths", "message"),
  [
    (
      "encodr",
      r"frozen='encodr' is unknown; did you mean 'encoder'.*\['dino_head', 'encoder'",
    ),
    (
      "dino_head, encoder/embd",
      r"mean 'encoder/embed'.*allowed: \['encoder/class_token', 'e",
    ),
    ("encoder/norm/scale/x", r"allowed: \['encoder/norm/scale'\]"),
    ("encoder,dino_head", "'encoder,dino_head' leaves no parameter to train"),
  ],
)
def test_frozen_paths_that_cannot_be(paths, message):
  tx, tree = optim.build(section(frozen=paths), steps=9, warmup=0).tx, encoder_params(scan=False)
  with pytest.raises(ValueError, match=message):
    tx.update(tree, tx.init(tree), tree)


def test_clip_parts_clips_each_part_on_its_own():
  updates = {"a": {"x": jnp.asarray([3.0, 4.0])}, "b": {"x": jnp.asarray([0.3]), "y": jnp.zeros(2)}}
  found, _ = optim.clip_parts(0.5).update(updates, optim.clip_parts(0.5).init(updates))
  np.testing.assert_allclose(found["a"]["x"], [0.3, 0.4], rtol=1e-6)
  np.testing.assert_array_equal(found["b"]["x"], updates["b"]["x"])
  whole = optim.build(section(name="lars", clip=0.5, clip_parts=True), steps=4, warmup=0)
  assert whole.tx.update(updates, whole.tx.init(updates), updates)[0]["a"]["x"].shape == (2,)
