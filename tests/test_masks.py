"""Mask samplers: no repeats, no leaks, the stated distributions, early errors."""

from __future__ import annotations

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from masks_oracle import (
  all_places,
  check_frequencies,
  check_near,
  coverage,
  draw,
  free_probabilities,
  member,
  sides,
)

from jepax import masks
from jepax.masks import Masks, MultiBlock, Random, TokenSet, blocks, multiblock

# Default mode -------------------------------------------------------------------------------------

SQUARE = MultiBlock(grid=(14, 14))
OBLONG = MultiBlock(grid=(6, 10), targets=3, min_keep=2)


@pytest.fixture(scope="module", params=[SQUARE, OBLONG], ids=["14x14", "6x10"])
def free(request):
  """(sampler, 10,000 draws, context [b n], targets [b m n])."""
  sampler = request.param
  drawn = draw(sampler, 10_000)
  return sampler, drawn, member(drawn.context, sampler.count), member(drawn.targets, sampler.count)


def test_default_context_and_targets_are_disjoint(free):
  sampler, drawn, context, targets = free
  assert not (context & targets.any(1)).any()
  assert (context.sum(1) >= sampler.min_keep).all()
  assert context.shape == (10_000, sampler.count) and targets.shape[1] == sampler.targets
  assert drawn.context.index.shape[-1] == sampler.context_size
  assert drawn.targets.index.shape[-1] == sampler.target_size
  assert not drawn.clipped.any()


def test_default_sizes_and_places_have_the_stated_distribution(free):
  sampler, drawn, _, targets = free
  sizes = free_probabilities(sampler.grid, sampler.target_scale, sampler.target_aspect)
  assert sum(sizes.values()) == pytest.approx(1)
  check_frequencies(sides(drawn.targets, sampler.grid[1]), sizes)
  target = coverage(sizes, sampler.grid, sampler.grid)
  assert target.min() > 0  # every patch can be a target
  for m in range(sampler.targets):
    check_near(targets[:, m].astype(float), target)


def test_default_context_has_the_stated_distribution(free):
  sampler, _, context, _ = free
  sizes = free_probabilities(sampler.grid, sampler.target_scale, sampler.target_aspect)
  block = free_probabilities(sampler.grid, sampler.context_scale, (1 - 1e-9, 1 + 1e-9))
  # Blocks are independent, so a patch is context if inside one and outside all others. Filling up
  # to min_keep adds to this only where fewer are left, which is rarer than the errors seen here.
  outside = (1 - coverage(sizes, sampler.grid, sampler.grid)) ** sampler.targets
  expected = coverage(block, sampler.grid, sampler.grid) * outside
  assert expected.min() > 0
  check_near(context.astype(float), expected)
  image = context.reshape(-1, *sampler.grid).astype(float)
  check_near(image - image[:, ::-1], 0.0)
  check_near(image - image[:, :, ::-1], 0.0)


def test_default_targets_of_a_sample_differ_in_size():
  sizes = sides(draw(SQUARE, 256).targets, 14)
  assert (sizes != sizes[:, :1]).any(axis=(1, 2)).mean() > 0.9


@pytest.fixture(scope="module")
def padded():
  return draw(dataclasses.replace(SQUARE, context_keep=196), 10_000)


def test_surplus_context_is_dropped_at_random(padded):
  """Each of a context's c patches is kept with probability k / c, wherever it lies."""
  keep = 60
  small = draw(dataclasses.replace(SQUARE, context_keep=keep), 10_000)
  full = member(padded.context, 196)
  kept = member(small.context, 196)
  found = full.sum(1, keepdims=True)
  assert not (kept & ~full).any()
  assert (kept.sum(1) == np.minimum(found[:, 0], keep)).all()
  assert (small.clipped == (found[:, 0] > keep)).all() and 0 < small.clipped.mean() < 1
  # 5 standard errors of the binomial with the known probabilities; full is given.
  probability = full * np.minimum(keep / found, 1)
  error = np.sqrt((probability * (1 - probability)).sum(0))
  assert (np.abs(kept.sum(0) - probability.sum(0)) <= 5 * error).all()


def test_more_slots_change_nothing_but_padding(padded):
  tight = draw(SQUARE, 10_000)
  slots = SQUARE.context_size
  assert tight.context.index.shape[1] == slots < padded.context.index.shape[1] == 196
  np.testing.assert_array_equal(tight.context.index, padded.context.index[:, :slots])
  np.testing.assert_array_equal(tight.context.size, padded.context.size)
  np.testing.assert_array_equal(tight.targets.index, padded.targets.index)


def test_small_contexts_are_filled_up_from_outside_the_block():
  sampler = MultiBlock(grid=(14, 14), context_scale=(0.06, 0.06))  # a block of 3 x 3
  drawn = draw(sampler, 2_000)
  context, targets = (member(x, 196) for x in (drawn.context, drawn.targets))
  assert (context.sum(1) == 10).all()
  assert not (context & targets.any(1)).any()
  # The block's free patches come first: they lie within 3 x 3, the tenth most often does not.
  row, col = np.divmod(drawn.context.index, 14)
  near = (np.abs(row - row[:, :1]) < 3) & (np.abs(col - col[:, :1]) < 3)
  assert near[:, 1].mean() > near[:, 9].mean() + 0.3


def test_target_slots_are_the_largest_block():
  assert SQUARE.target_size == 42 and MultiBlock(grid=(16, 16)).target_size == 56
  for grid in [(4, 4), (7, 7), (14, 14), (28, 28), (6, 10), (3, 20)]:
    fine = free_probabilities(grid, (0.15, 0.2), (0.75, 1.5), points=2_000)
    assert blocks.free_sizes(grid, (0.15, 0.2), (0.75, 1.5)) == sorted(fine)


# Keys and tracing ---------------------------------------------------------------------------------

SAMPLERS = [
  MultiBlock(grid=(7, 7), min_keep=1),
  MultiBlock(grid=(12, 12), min_keep=9, compat="ijepa", truncation_group=4),
  Random(tokens=49, ratio=0.6),
]
NAMES = ["default", "ijepa", "random"]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=NAMES)
def test_same_keys_same_masks_on_any_devices_in_one_trace(sampler):
  traces = []

  @jax.jit
  def f(keys, step_key):
    traces.append(None)
    return sampler(keys, step_key)

  keys, step_key = jax.random.split(jax.random.key(0), 16), jax.random.key(1)
  one = f(keys, step_key)
  again = f(keys, step_key)
  other = f(jax.random.split(jax.random.key(2), 16), jax.random.key(3))
  assert len(traces) == 1
  jax.tree.map(np.testing.assert_array_equal, one, again)
  assert (one.context.index != other.context.index).any()
  context = member(one.context, 196)
  assert (context != context[:1]).any(1)[1:].all()  # samples have masks of their own

  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spread = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))
  jax.tree.map(np.testing.assert_array_equal, one, f(spread, step_key))


@pytest.mark.parametrize("sampler", [SAMPLERS[0], SAMPLERS[2]], ids=["default", "random"])
def test_masks_depend_on_the_sample_not_on_its_place(sampler):
  keys, step_key = jax.random.split(jax.random.key(0), 8), jax.random.key(1)
  order = np.array([5, 2, 7])
  sample = jax.jit(sampler)
  expected = jax.tree.map(lambda x: x[order], sample(keys, step_key))
  found = sample(keys[order], jax.random.key(9))
  jax.tree.map(np.testing.assert_array_equal, found, expected)


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"grid": (4, 4), "min_keep": 14}, r"4 of the 16 patches.*min_keep at most 12"),
    ({"grid": (7, 7), "target_scale": (0.2, 0.8)}, r"42 of the 49 .*min_keep at most 7 or"),
    ({"grid": (2, 2), "target_scale": (0.9, 1.0), "min_keep": 1}, r"4 of the 4 .*smaller target"),
    ({"grid": (8, 8), "compat": "ijepa"}, r"have 9 patches.*min_keep=10; choose min_keep at mos"),
    ({"grid": (8, 8), "compat": "ijepa", "min_keep": 8}, r"up to 43 .* 49 .*min_keep at most 5"),
    ({"grid": (4, 4), "compat": "ijepa", "min_keep": 1}, r"have 1 patches.*larger target_scale"),
    ({"grid": (1, 1), "compat": "ijepa", "min_keep": 1}, r"have 0 patches"),
    ({"grid": (7, 7), "compat": "ijepa", "min_keep": 1}, r"of a context's 36 .*fewer targets"),
    ({"grid": (14, 16), "compat": "ijepa"}, r"square grids, found \(14, 16\)"),
    ({"grid": (14, 14), "compat": "ijeppa"}, "found 'ijeppa'; did you mean 'ijepa'"),
    ({"grid": (0, 14)}, r"two positive .* found \(0, 14\)"),
    ({"grid": (14, 14), "targets": 0}, "targets must be at least 1, found 0"),
    ({"grid": (14, 14), "min_keep": 0}, "min_keep must be at least 1, found 0"),
    ({"grid": (14, 14), "truncation_group": 0}, "truncation_group must be at least 1, found 0"),
    ({"grid": (14, 14), "target_scale": (0.2, 0.15)}, "target_scale must be a range"),
    ({"grid": (14, 14), "context_scale": (0.9, 1.1)}, "context_scale must be a range"),
    ({"grid": (14, 14), "target_aspect": (0.0, 1.0)}, "target_aspect must be a range"),
    ({"grid": (14, 14), "context_keep": 9}, "from min_keep=10 to the 196 .* found 9"),
    ({"grid": (14, 14), "context_keep": 197}, "from min_keep=10 to the 196 .* found 197"),
  ],
)
def test_impossible_settings_name_the_numbers(settings, message):
  with pytest.raises(ValueError, match=message):
    MultiBlock(**settings)


def test_what_the_errors_advise_works():
  MultiBlock(grid=(7, 7), target_scale=(0.2, 0.8), min_keep=7)
  MultiBlock(grid=(8, 8), compat="ijepa", min_keep=5)
  MultiBlock(grid=(12, 12), compat="ijepa", min_keep=9)


@pytest.mark.parametrize(
  "sampler",
  [
    MultiBlock(grid=(4, 4), min_keep=4, targets=3),
    MultiBlock(grid=(4, 4), min_keep=6, target_scale=(0.25, 0.5)),  # four could cover all of it
    MultiBlock(grid=(1, 6), min_keep=2, targets=2),
    MultiBlock(grid=(8, 8), min_keep=5, compat="ijepa"),
  ],
  ids=["4x4", "crowded", "1x6", "8x8-ijepa"],
)
def test_small_grids(sampler):
  drawn = draw(sampler, 512)
  context, targets = (member(x, sampler.count) for x in (drawn.context, drawn.targets))
  assert not (context & targets.any(1)).any()
  assert (context.sum(1) >= sampler.min_keep).all() and (targets.sum(2) >= 1).all()


@pytest.mark.parametrize("target", [(3, 2), (2, 4), (4, 5), (1, 1)])
def test_largest_context_occurs_and_is_the_bound(target):
  """By enumeration of all places on a grid small enough."""
  area, block = (5, 6), (4, 4)
  kept = [(b & ~t).sum() for b in all_places(block, area) for t in all_places(target, area)]
  assert blocks.largest_context([block], [target], area) == max(kept)


def test_most_covered_bounds_every_placement():
  """By enumeration of three 3x2 blocks on 5x5, where areas alone would say 18."""
  area, size = (5, 5), (3, 2)
  covers = all_places(size, area)
  best = max(
    (a | b | c).sum()
    for i, a in enumerate(covers)
    for j, b in enumerate(covers[i:], i)
    for c in covers[j:]
  )
  assert best <= blocks.most_covered(size, area, 3) <= best + 1
  assert blocks.most_covered((1, 2), area, 3) == 6  # blocks that fit side by side


# Random masks and token sets ----------------------------------------------------------------------


@pytest.mark.parametrize(
  ("tokens", "ratio", "kept"),
  [(196, 0.6, 78), (196, 0.7, 58), (196, 0.75, 49), (256, 0.75, 64), (10, 0.9, 1), (49, 0.75, 12)],
)
def test_random_keeps_as_many_as_the_reference(tokens, ratio, kept):
  sampler = Random(tokens=tokens, ratio=ratio)
  assert (sampler.context_size, sampler.target_size) == (kept, tokens - kept)


def test_random_masks_split_the_tokens_uniformly():
  sampler = Random(tokens=49, ratio=0.75)
  drawn = draw(sampler, 10_000)
  context, targets = member(drawn.context, 49), member(drawn.targets, 49)
  assert drawn.context.valid.all() and drawn.targets.valid.all() and targets.shape[1] == 1
  np.testing.assert_array_equal(context, ~targets[:, 0])
  check_near(context.astype(float), 12 / 49)
  together = context[:, :1] & context[:, 1:]  # no pair is favoured either
  check_near(together.astype(float), 12 * 11 / (49 * 48))


@pytest.mark.parametrize(
  ("tokens", "ratio", "message"),
  [
    (1, 0.5, "found 1"),
    (49, 1.0, "found 1.0"),
    (49, 0.0, "found 0.0"),
    (49, 0.99, "keeps 0 of 49"),
    (4, 1e-7, "keeps 4 of 4"),
  ],
)
def test_random_impossible_settings(tokens, ratio, message):
  with pytest.raises(ValueError, match=message):
    Random(tokens=tokens, ratio=ratio)


def test_metrics_are_means_over_the_batch():
  valid = jnp.array([[True, True, False], [True, False, False]])
  context = TokenSet(index=jnp.zeros((2, 3), jnp.int32), valid=valid)
  targets = TokenSet(index=jnp.zeros((2, 1, 3), jnp.int32), valid=jnp.ones((2, 1, 3), bool))
  metrics = Masks(context=context, targets=targets, clipped=jnp.array([True, False])).metrics()
  assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics.values())
  assert {name: float(x) for name, x in metrics.items()} == {
    "mask/context_tokens": 1.5,
    "mask/target_tokens": 3.0,
    "mask/context_clipped": 0.5,
  }


def test_gather_takes_each_samples_own_tokens():
  x = jnp.arange(2 * 5 * 3).reshape(2, 5, 3)
  one = masks.gather(x, TokenSet(jnp.array([[4, 0], [1, 3]]), jnp.ones((2, 2), bool)))
  np.testing.assert_array_equal(one, np.stack([x[0, [4, 0]], x[1, [1, 3]]]))
  index = jnp.array([[[4, 0], [2, 2]], [[1, 3], [0, 1]]])
  many = masks.gather(x, TokenSet(index, jnp.ones((2, 2, 2), bool)))
  np.testing.assert_array_equal(many[1, 0], x[1, jnp.array([1, 3])])
  assert many.shape == (2, 2, 2, 3)


def test_to_bool_ignores_padding():
  tokens = TokenSet(jnp.array([[3, 1, 0]]), jnp.array([[True, True, False]]))
  expected = [[False, True, False, True, False]]
  np.testing.assert_array_equal(masks.to_bool(tokens, count=5), expected)


def test_a_sampler_is_a_value_and_its_file_a_module():
  assert inspect.ismodule(multiblock) and multiblock.MultiBlock is MultiBlock
  assert MultiBlock(grid=(14, 14)) == SQUARE and hash(MultiBlock(grid=(14, 14))) == hash(SQUARE)
