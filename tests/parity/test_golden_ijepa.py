"""I-JEPA against arrays captured from the reference code (see `capture_ijepa.py`).

Tolerances: the capture ran the reference in float32 and in float64 and stored the largest
difference of each result, its `rounding`. Two float32 programs that sum in another order may lie
on two sides of the exact result, and one machine's sums are a little better than another's: the
difference allowed is `FACTOR` times the reference's own rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ijepa_weights import tree

from jepax import config as config_lib
from jepax import optim
from jepax.core import TrainState, make_train_step
from jepax.masks.tokens import Masks, TokenSet
from jepax.methods import ijepa
from jepax.methods.jepa import JEPA
from jepax.models.vit import sincos2d

FACTOR = 4
EPSILON = np.finfo(np.float32).eps  # 2**-23
GOLDEN = dict(np.load(Path(__file__).with_name("golden_ijepa.npz")))
CONFIG = json.loads(str(GOLDEN["config"]))


@dataclasses.dataclass(frozen=True)
class Captured:
  """The captured images as the floats they stand for, without augmentation."""

  def __call__(self, keys: jax.Array, images: jax.Array) -> jax.Array:
    return self.clean(images)

  def clean(self, images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 64 - 2


def section(prefix: str) -> dict[str, np.ndarray]:
  """The arrays below a prefix, by the reference's names."""
  return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


def params(prefix: str) -> dict:
  """Encoder and predictor below a prefix, as jepax's tree."""
  return {name: tree(section(f"{prefix}/{name}/")) for name in ("encoder", "predictor")}


def steps(config: dict) -> int:
  return config["epochs"] * config["steps_per_epoch"]


@functools.cache
def method() -> JEPA:
  """The preset, with the captured images as views; its masks are replaced where it runs."""
  c = CONFIG
  run = config_lib.Run(size=c["size"], channels=3, mean=(0.5,) * 3, std=(0.5,) * 3, steps=steps(c))
  sizes = dict(width=c["width"], depth=c["depth"], heads=c["heads"], mlp_width=4 * c["width"])
  built = ijepa.build(
    run,
    encoder=dict(variant="tiny", patch=c["patch"], **sizes),
    predictor=dict(width=c["predictor_width"], depth=c["predictor_depth"]),
    masks=dict(min_keep=3),
    views=dict(),
    momentum=c["momentum"],
  )
  return dataclasses.replace(built, views=Captured())


def with_masks(masks: Masks) -> JEPA:
  """The method whose sampler returns these; inside jit they may be traced."""
  return dataclasses.replace(method(), masks=lambda sample_keys, step_key: masks)


def optimizer(config: dict) -> optim.Optimizer:
  """jepax's own, by the numbers the reference was given."""
  names = ("start_lr", "lr", "final_lr", "weight_decay", "final_weight_decay")
  fields = config_lib.base().optim
  fields.update({name: config[name] for name in names})
  warmup = config["warmup_epochs"] * config["steps_per_epoch"]
  return optim.build(fields, steps=steps(config), warmup=warmup)


def tokens(index: np.ndarray, *, slots: int | None = None) -> TokenSet:
  """Captured indices, padded to `slots` where given."""
  count = index.shape[-1]
  padding = [(0, 0)] * (index.ndim - 1) + [(0, (slots or count) - count)]
  valid = np.pad(np.ones_like(index, bool), padding)
  return TokenSet(np.pad(index, padding), valid)


def contexts(count: int) -> list[TokenSet]:
  return [tokens(GOLDEN["context"][:, i]) for i in range(count)]


def targets(blocks: int) -> TokenSet:
  return tokens(GOLDEN["targets"][:, :blocks])


def check(found, expected, *, allowed: float, what: str) -> None:
  """The largest difference over all leaves is at most `allowed`."""
  chex.assert_trees_all_equal_shapes(found, expected)
  differences = jax.tree_util.tree_map(
    lambda x, y: np.abs(np.float64(x) - np.float64(y)).max(), found, expected
  )
  path, largest = max(jax.tree_util.tree_leaves_with_path(differences), key=lambda leaf: leaf[1])
  where = what + jax.tree_util.keystr(path)
  assert largest <= allowed, f"{where}: largest difference {largest:.2e}, allowed {allowed:.2e}"


def rounding(name: str) -> float:
  return FACTOR * float(GOLDEN[f"rounding/{name}"])


def without_key_bias(params: dict) -> dict:
  """Zeros in place of the keys' bias in every block.

  Softmax does not see what shifts all logits of a query: the bias has no effect, its exact
  gradient is zero, and Adam makes moves of the size of the learning rate out of the rounding.
  """

  def cut(path, x):
    if jax.tree_util.keystr(path).endswith("['qkv']['bias']"):
      x = np.array(x).reshape(3, -1)
      x[1] = 0
    return x

  return jax.tree_util.tree_map_with_path(cut, params)


# --- encoder and predictor ------------------------------------------------------------------


@pytest.mark.parametrize("network, name", [("encoder", ""), ("predictor", "predictor_")])
def test_position_tables(network, name):
  table = GOLDEN[f"weights/{network}/{name}pos_embed"][0]
  np.testing.assert_array_equal(sincos2d(method().grid, table.shape[-1]), table)


@functools.cache
def jitted(network: str):
  if network == "encoder":
    return jax.jit(method().encoder.apply)
  return jax.jit(functools.partial(method().predictor.apply, grid=method().grid))


def encode(masks: TokenSet | None) -> np.ndarray:
  images = method().views.clean(GOLDEN["images"])
  weights = {"params": tree(section("weights/encoder/"))}
  return np.asarray(jitted("encoder")(weights, images, masks))


def test_encoder_on_the_whole_image():
  expected = GOLDEN["encoder/whole"]
  check(encode(None), expected, allowed=rounding("encoder/whole"), what="encoder")


@pytest.mark.parametrize("count", [1, 2])
def test_encoder_on_contexts(count):
  """Rows of the reference: context by context, and in each sample by sample."""
  found = np.concatenate([encode(context) for context in contexts(count)])
  what = f"encoder, {count} contexts"
  check(found, GOLDEN[f"encoder/{count}"], allowed=rounding(f"encoder/{count}"), what=what)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("count", [1, 2])
def test_predictor(count, blocks):
  """Rows of the reference: block by block, in each context by context, in each by sample."""
  weights = {"params": tree(section("weights/predictor/"))}
  encoded = np.split(GOLDEN[f"encoder/{count}"], count)
  rows = [
    jitted("predictor")(weights, x, context, targets(blocks))  # [b m t d]
    for x, context in zip(encoded, contexts(count), strict=True)
  ]
  found = np.stack(rows).transpose(2, 0, 1, 3, 4)  # [m contexts b t d]
  case = f"predictor/{count}x{blocks}"
  found = found.reshape(GOLDEN[case].shape)
  check(found, GOLDEN[case], allowed=rounding(case), what=case)


# --- loss and gradients ---------------------------------------------------------------------


def loss(weights, carry, masks: Masks, images) -> jax.Array:
  key = jax.random.key(0)
  return with_masks(masks).loss(weights, carry, {"image": images}, key, 0)[0]


def of_contexts(function, blocks: int) -> list:
  """What a function of `loss`'s arguments gives for each of the two contexts."""
  run = jax.jit(function)
  clipped = np.zeros(CONFIG["batch"], bool)
  carry = {"target": tree(section("weights/target/"))}
  return [
    run(params("weights"), carry, Masks(context, targets(blocks), clipped), GOLDEN["images"])
    for context in contexts(2)
  ]


@functools.cache
def results(blocks: int) -> list[tuple[jax.Array, dict]]:
  """Loss and, of 4 blocks only, gradient: the other one would cost time and tell no more."""
  if blocks == 4:
    return of_contexts(jax.value_and_grad(loss), blocks)
  return [(value, {}) for value in of_contexts(loss, blocks)]


def mean(trees: list):
  """The reference's mean over all rows is the mean over contexts, which have equally many."""
  return jax.tree.map(lambda *x: np.mean(np.float64(x), 0), *trees)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("count", [1, 2])
def test_loss(count, blocks):
  found, _ = mean(results(blocks)[:count])
  case = f"loss/{count}x{blocks}"
  # One number can be right by luck: its rounding is at least one unit in the last place.
  allowed = max(rounding(case), FACTOR * EPSILON * GOLDEN[case])
  check(found, GOLDEN[case], allowed=allowed, what=case)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients(count):
  _, found = mean(results(4)[:count])
  case = f"gradients/{count}x4"
  check(found, params(case), allowed=rounding(case), what=case)


# --- optimizer, target, schedules -----------------------------------------------------------


def test_adamw_steps():
  """Two updates from the reference's gradients, by its parameter groups."""
  tx = optimizer(CONFIG).tx
  moved = params("weights")
  state = tx.init(moved)
  update = jax.jit(tx.update)
  for case in ("gradients/1x4", "gradients/2x4"):
    updates, state = update(params(case), state, moved)
    moved = jax.tree.map(jnp.add, moved, updates)
  check(moved, params("adamw/after"), allowed=rounding("adamw/after"), what="AdamW")


def test_target_update():
  last = params("trajectory/last")
  before = {"target": tree(section("trajectory/before_last/target/"))}
  expected = {"target": tree(section("trajectory/last/target/"))}
  found = jax.jit(method().update)(last, before, steps(CONFIG) - 1)
  # Both round a product and a sum of numbers up to the largest weight.
  allowed = 2 * EPSILON * max(np.abs(x).max() for x in jax.tree.leaves(expected))
  check(found, expected, allowed=allowed, what="EMA")


@pytest.mark.parametrize(
  "name, scale",
  [("learning_rate", "lr"), ("weight_decay", "final_weight_decay")],
)
def test_schedules(name, scale):
  """Update u, counted from 1, is step u - 1 of jepax; the reference's schedulers are then at u.

  They advance before they are read: no update uses `start_lr` or `weight_decay` themselves.
  """
  config = CONFIG["recipe"]
  schedule = optimizer(config).schedules[f"schedule/{name}"]
  found = jax.jit(schedule)(GOLDEN["schedules/update"] - 1)
  # A cosine of numbers up to pi, in float32, times the largest value.
  allowed = 4 * EPSILON * config[scale]
  check(found, GOLDEN[f"schedules/{name}"], allowed=allowed, what=name)


def test_momentum_schedule():
  """Update u, counted from 1, uses momentum u - 1 in both: the first is the start itself."""
  config = CONFIG["recipe"]
  schedule = optim.linear(*config["momentum"], steps=steps(config))
  found = jax.jit(schedule)(GOLDEN["schedules/update"] - 1)
  check(found, GOLDEN["schedules/momentum"], allowed=EPSILON, what="momentum")


# --- trajectory -----------------------------------------------------------------------------


def captured_masks(step: int) -> Masks:
  """Padded to one size for all steps, so that one compiled step serves them."""
  context = tokens(GOLDEN[f"trajectory/context/{step}"], slots=16)
  blocks = tokens(GOLDEN[f"trajectory/targets/{step}"], slots=8)
  return Masks(context, blocks, np.zeros(CONFIG["batch"], bool))


def initial_state(tx) -> TrainState:
  """The state of step 0, with the captured weights; the target starts as the encoder's copy."""
  weights = params("weights")
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=weights,
    carry={"target": weights["encoder"]},
    opt_state=tx.init(weights),
    key=jax.random.key_data(jax.random.key(0)),
    skipped=jnp.zeros(2, jnp.int32),
  )


def bias_correction_error() -> float:
  """Share by which optax's Adam steps are too short while t is far below 1 / (1 - b2).

  It divides by 1 - b2**t in float32, where b2 = 0.999 is off by 1e-8, hence 1 - b2 by 1e-5.
  torch has b2 in float64. With that line exact the losses differ by 1e-7 at most.
  """
  return 1 - (float(1 - np.float32(0.999)) / 0.001) ** 0.5


def test_trajectory():
  """20 steps of the reference's training script: each loss, then the weights."""
  tx = optimizer(CONFIG).tx

  @jax.jit
  @chex.assert_max_traces(1)
  def step(state, images, masks):
    return make_train_step(with_masks(masks), tx)(state, {"image": images})

  state, losses = initial_state(tx), []
  for i in range(steps(CONFIG)):
    state, metrics = step(state, GOLDEN[f"trajectory/images/{i}"], captured_masks(i))
    losses.append(float(metrics["train/loss"]))
  expected = GOLDEN["trajectory/loss"]
  differences = np.abs(np.array(losses) - expected)
  # Steps too short by a share reach a loss too high by that share of the way down.
  lag = bias_correction_error() * (expected[0] - expected.min())
  allowed = rounding("trajectory/loss") + lag
  assert int(state.skipped[1]) == 0
  table = "".join(f"\n  step {i}: {losses[i]:.7f}, {d:.1e}" for i, d in enumerate(differences))
  assert (differences <= allowed).all(), f"losses differ by more than {allowed:.1e}:{table}"
  found = {**state.params, **state.carry}
  expected = {name: tree(section(f"trajectory/last/{name}/")) for name in found}
  found, expected = without_key_bias(found), without_key_bias(expected)
  check(found, expected, allowed=rounding("trajectory/last"), what="last weights")
