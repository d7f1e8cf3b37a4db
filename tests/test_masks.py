"""Mask samplers: no repeats, no leaks, the stated distributions, early errors.

Means are compared within 5 standard errors: with fixed keys a test never flips, and a true
distribution would have failed one comparison in two million.
"""

from __future__ import annotations

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from jepax import masks
from jepax.masks import Masks, MultiBlock, Random, TokenSet, blocks, multiblock

STEPS, BATCH = 400, 128  # the reference's batch per GPU for ViT-H/14


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
  """Compiling is most of the time here, and its optimisations gain nothing on arrays this small."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def draw(sampler, count: int, seed: int = 0) -> Masks:
  key, step_key = jax.random.split(jax.random.key(seed))
  return jax.device_get(jax.jit(sampler)(jax.random.split(key, count), step_key))


def draw_steps(sampler, steps: int, count: int, seed: int = 0) -> Masks:
  key, step_key = jax.random.split(jax.random.key(seed))
  keys = jax.random.split(key, (steps, count))
  return jax.device_get(jax.jit(jax.vmap(sampler))(keys, jax.random.split(step_key, steps)))


def member(tokens: TokenSet, count: int) -> np.ndarray:
  """bool[..., n], having checked that no valid index repeats and that padding is last and 0."""
  index, valid = np.asarray(tokens.index), np.asarray(tokens.valid)
  assert index.shape == valid.shape and index.dtype == np.int32 and valid.dtype == bool
  assert (index >= 0).all() and (index < count).all() and (index[~valid] == 0).all()
  assert (valid[..., :-1] >= valid[..., 1:]).all()
  out = np.zeros((*index.shape[:-1], count + 1), bool)
  np.put_along_axis(out, np.where(valid, index, count), True, axis=-1)
  assert (out[..., :count].sum(-1) == valid.sum(-1)).all()
  return out[..., :count]


def check_near(units: np.ndarray, expected, *, slack=0.0):
  """The mean of independent units, axis 0, within 5 standard errors of what is expected."""
  error = units.std(0) / math.sqrt(len(units))
  off = np.abs(units.mean(0) - expected)
  assert (off <= 5 * error + slack).all(), (off.max(), (off / (error + 1e-12)).max())


def sides(tokens: TokenSet, width: int) -> np.ndarray:
  """(h, w) of each block [..., 2], having checked that it is a full rectangle."""
  index, valid = tokens.index, tokens.valid
  row, col = np.divmod(index, width)
  h, w = (np.where(valid, x, 0).max(-1) - np.where(valid, x, width).min(-1) + 1 for x in (row, col))
  assert (h * w == valid.sum(-1)).all()
  return np.stack([h, w], -1)


def check_frequencies(found: np.ndarray, expected: dict):
  """Chi-square of drawn sizes [..., 2] against {(h, w): probability}."""
  seen, counts = np.unique(found.reshape(-1, 2), axis=0, return_counts=True)
  counts = dict(zip(map(tuple, seen.tolist()), counts.tolist(), strict=True))
  assert set(counts) <= set(expected)
  total = sum(counts.values())
  observed = [counts.pop(size, 0) for size in expected]
  p = stats.chisquare(observed, [q * total for q in expected.values()]).pvalue
  assert p > 1e-6, p  # as improbable as 5 standard errors


# The expected distributions, by enumeration -------------------------------------------------------


def free_probabilities(grid, scale, aspect, points=20_000) -> dict:
  """P(h, w) when scale and aspect are independent: exact in scale, midpoints over aspect."""
  n = grid[0] * grid[1]
  a = aspect[0] + (np.arange(points) + 0.5) / points * (aspect[1] - aspect[0])
  out = {}
  for h in range(1, grid[0] + 1):
    for w in range(1, grid[1] + 1):
      h_low, w_low = (x - 0.5 if x > 1 else 0.0 for x in (h, w))
      h_high, w_high = (x + 0.5 if x < g else np.inf for x, g in zip((h, w), grid, strict=True))
      low = np.maximum(np.maximum(h_low**2 / a, w_low**2 * a) / n, scale[0])
      high = np.minimum(np.minimum(h_high**2 / a, w_high**2 * a) / n, scale[1])
      p = np.clip(high - low, 0, None).mean() / (scale[1] - scale[0])
      if p > 0:
        out[h, w] = p
  return out


def coverage(probabilities: dict, grid, area) -> np.ndarray:
  """P(patch in block), [n], for a block placed anywhere in the area's top left part of the grid."""

  def line(side, length, limit):
    tops = np.arange(limit - side + 1)[:, None]
    cells = np.arange(length)
    return ((cells >= tops) & (cells < tops + side)).mean(0)

  total = sum(
    p * np.outer(line(h, grid[0], area[0]), line(w, grid[1], area[1]))
    for (h, w), p in probabilities.items()
  )
  return total.ravel()


def slow_ijepa_size(u: float, grid: int, scale, aspect) -> tuple[int, int]:
  """The reference's formula, word by word of the fact sheet."""
  s = scale[0] + u * (scale[1] - scale[0])
  a = aspect[0] + u * (aspect[1] - aspect[0])
  n = int(grid * grid * s)
  h, w = round(math.sqrt(n * a)), round(math.sqrt(n / a))
  while h >= grid:
    h -= 1
  while w >= grid:
    w -= 1
  return h, w


def table_probabilities(table: blocks.SizeTable) -> dict:
  out = {}
  edges = [0, *table.breaks.tolist(), blocks.IJEPA_DRAWS]
  for i, size in enumerate(zip(table.heights.tolist(), table.widths.tolist(), strict=True)):
    out[size] = out.get(size, 0.0) + (edges[i + 1] - edges[i]) / blocks.IJEPA_DRAWS
  return out


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


# compat='ijepa' -----------------------------------------------------------------------------------

# Fact sheet: (h, w) -> probability, rounded to at most 3 digits; measured over 1000 batches of 128.
TABLE = {
  14: {(5, 6): 0.265, (6, 6): 0.2185, (6, 5): 0.126, (7, 5): 0.364, (8, 5): 0.026},
  16: {(5, 7): 0.047, (6, 7): 0.279, (6, 6): 0.016, (7, 6): 0.289, (8, 6): 0.296, (9, 6): 0.073},
  28: {
    (9, 12): 0.020,
    (10, 12): 0.166,
    (11, 12): 0.115,
    (11, 11): 0.046,
    (12, 11): 0.174,
    (13, 11): 0.167,
    (14, 11): 0.103,
    (14, 10): 0.066,
    (15, 10): 0.1435,
  },
}
MEASURED = {  # mean and standard deviation over batches of C; mean C by target size; raw floor
  14: (50.5, 7.3, {(5, 6): 56.8, (6, 5): 56.5, (7, 5): 48.2, (6, 6): 42.8, (8, 5): 40.6}, 25),
  16: (68.5, 10.0, {(5, 7): 90.5, (6, 7): 71.6, (7, 6): 71.5, (8, 6): 62.0, (9, 6): 54.0}, 36),
}
RAW_MEAN = {14: (81.8, 86.4), 16: (110.1, 114.3)}  # tokens of a context, of the targets' union
ROUNDING = 0.05  # the table's one digit after the point


@pytest.mark.parametrize("grid", TABLE)
def test_ijepa_sizes_equal_the_reference_formula(grid):
  ranges = ((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0))
  tables = [blocks.ijepa_sizes((grid, grid), *pair) for pair in ranges]
  for pair, table in zip(ranges, tables, strict=True):
    edges = table.breaks.astype(np.int64)
    some = np.random.default_rng(0).integers(0, blocks.IJEPA_DRAWS, 3_000)
    draws = np.concatenate([edges - 1, edges, [0, blocks.IJEPA_DRAWS - 1], some])
    found = _sizes_at(table, draws)
    assert found == [slow_ijepa_size(k / 2**24, grid, *pair) for k in draws.tolist()]
  # The reference seeds a generator by the step; its first draw sets targets, the second contexts.
  draws = np.array(
    [np.random.RandomState(s).randint(0, 2**32, 2, np.uint32) & 0xFFFFFF for s in range(100)]
  )
  for i, (pair, table) in enumerate(zip(ranges, tables, strict=True)):
    expected = [slow_ijepa_size(k / 2**24, grid, *pair) for k in draws[:, i].tolist()]
    assert _sizes_at(table, draws[:, i]) == expected


def _sizes_at(table, draws):
  i = np.searchsorted(table.breaks, draws, side="right")
  return list(zip(table.heights[i].tolist(), table.widths[i].tolist(), strict=True))


@pytest.mark.parametrize("grid", TABLE)
def test_ijepa_size_probabilities_are_those_of_the_fact_sheet(grid):
  found = table_probabilities(blocks.ijepa_sizes((grid, grid), (0.15, 0.2), (0.75, 1.5)))
  assert found == pytest.approx(TABLE[grid], abs=6e-4)  # the table's three digits
  context = table_probabilities(blocks.ijepa_sizes((grid, grid), (0.85, 1.0), (1.0, 1.0)))
  expected = {14: {(13, 13): 1.0}, 16: {(15, 15): 1.0}, 28: {(26, 26): 0.311, (27, 27): 0.689}}
  assert context == pytest.approx(expected[grid], abs=6e-4)


@pytest.fixture(scope="module", params=[14, 16])
def ijepa(request):
  """(grid, sampler, 400 steps of 128 samples)."""
  sampler = MultiBlock(grid=(request.param, request.param), compat="ijepa")
  return request.param, sampler, draw_steps(sampler, STEPS, BATCH)


def test_ijepa_sets_are_disjoint_and_never_touch_the_last_row_and_column(ijepa):
  grid, _, drawn = ijepa
  context = member(drawn.context, grid**2)  # [s b n]
  targets = member(drawn.targets, grid**2).any(2)
  assert not (context & targets).any()
  seen = (context | targets).any((0, 1)).reshape(grid, grid)
  assert seen[:-1, :-1].all() and not seen[-1].any() and not seen[:, -1].any()
  valid, index = drawn.context.valid, drawn.context.index
  assert (np.diff(index, axis=-1)[valid[..., 1:]] > 0).all()  # raster order


def test_ijepa_batch_shares_its_sizes(ijepa):
  grid, sampler, drawn = ijepa
  sizes = sides(drawn.targets, grid)  # [s b m 2]
  assert (sizes == sizes[:, :1, :1]).all()
  assert (drawn.context.size == drawn.context.size[:, :1]).all()
  assert sizes.prod(-1).max() <= sampler.target_size == max(h * w for h, w in TABLE[grid])


def test_ijepa_context_lengths_are_those_of_the_fact_sheet(ijepa):
  grid, _, drawn = ijepa
  mean, deviation, by_size, _ = MEASURED[grid]
  kept = drawn.context.size[:, 0].astype(float)
  # The table is itself a mean of 1000 batches.
  check_near(kept, mean, slack=5 * deviation / math.sqrt(1000) + ROUNDING)
  sizes = sides(drawn.targets, grid)[:, 0, 0]
  probability = TABLE[grid]
  for size, expected in by_size.items():
    group = kept[(sizes == size).all(1)]
    # The sheet's own error, from how many of its 1000 batches had this size.
    error = group.std() / math.sqrt(1000 * probability[size])
    check_near(group, expected, slack=5 * error + ROUNDING)


def test_ijepa_keeps_the_top_of_the_image_as_measured():
  sampler = MultiBlock(grid=(14, 14), compat="ijepa")
  cut = draw_steps(sampler, STEPS, BATCH)
  raw = draw_steps(dataclasses.replace(sampler, truncation_group=1), STEPS, BATCH)
  np.testing.assert_array_equal(cut.targets.index, raw.targets.index)
  np.testing.assert_array_equal(
    cut.context.size, raw.context.size.min(1, keepdims=True) + 0 * cut.context.size
  )
  np.testing.assert_array_equal(
    cut.context.index, np.where(cut.context.valid, raw.context.index, 0)
  )
  rows = [member(x.context, 196).reshape(STEPS, BATCH, 14, 14).sum((1, 3)) for x in (cut, raw)]
  kept, found = (x[:, :13].astype(float) for x in rows)
  assert (rows[0][:, 13] == 0).all()
  fraction = np.array([1, 1, 0.99, 0.95, 0.85, 0.78, 0.73, 0.68, 0.60, 0.46, 0.27, 0.10, 0.02])
  # kept = fraction * found over all steps, within both samples' errors and the table's two digits.
  off = (kept - fraction * found) / found.mean(0)
  check_near(off, 0.0, slack=0.005 + 5 * off.std(0) / math.sqrt(1000))


@pytest.mark.parametrize("grid", [14, 16])
def test_ijepa_single_samples(grid):
  """Sizes, places and raw contexts of 20,000 independent steps of one sample."""
  sampler = MultiBlock(grid=(grid, grid), compat="ijepa")
  drawn = draw_steps(sampler, 20_000, 1)
  table = blocks.ijepa_sizes((grid, grid), (0.15, 0.2), (0.75, 1.5))
  probabilities = table_probabilities(table)
  check_frequencies(sides(drawn.targets, grid)[:, 0, 0], probabilities)

  targets = member(drawn.targets, grid**2)[:, 0]
  expected = coverage(probabilities, (grid, grid), (grid - 1, grid - 1))
  check_near(targets.mean(1), expected)
  if grid == 14:
    rows = [0.70, 1.40, 2.10, 2.80, 3.51, 4.02, 4.28, 4.02, 3.51, 2.80, 2.10, 1.40, 0.70, 0]
    np.testing.assert_allclose(expected.reshape(14, 14).sum(1), rows, atol=0.03)  # measured there

  raw, union = drawn.context.size[:, 0], targets.any(1).sum(-1)
  _, _, _, floor = MEASURED[grid]
  assert raw.min() >= floor and raw.max() <= sampler.context_size
  # The sheet's 128,000 samples share 1000 sizes, whose spread makes nearly all of its error.
  sizes = sides(drawn.targets, grid)[:, 0, 0]
  for found, mean in zip((raw.astype(float), union.astype(float)), RAW_MEAN[grid], strict=True):
    between = math.sqrt(
      sum(
        p * (found[(sizes == size).all(1)].mean() - found.mean()) ** 2
        for size, p in probabilities.items()
      )
    )
    check_near(found, mean, slack=5 * between / math.sqrt(1000) + ROUNDING)


def test_ijepa_cuts_each_group_to_its_shortest_context_then_to_context_keep():
  sampler = MultiBlock(grid=(14, 14), compat="ijepa", truncation_group=4, context_keep=78)
  drawn = draw(sampler, 16)
  raw = draw(dataclasses.replace(sampler, truncation_group=1, context_keep=None), 16).context.size
  group = raw.reshape(4, 4).min(1).repeat(4)
  assert len(set(group)) > 1 and 0 < drawn.clipped.mean() < 1
  np.testing.assert_array_equal(drawn.context.size, np.minimum(group, 78))
  np.testing.assert_array_equal(drawn.clipped, group > 78)
  with pytest.raises(ValueError, match=r"truncation_group=4 .* not divide the batch of 6"):
    jax.eval_shape(sampler, jax.random.split(jax.random.key(0), 6), jax.random.key(0))


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"grid": (7, 7)}, r"4 targets of up to 12 .* cover 48 of the 49 .* min_keep at most 1, or ta"),
    ({"grid": (4, 4), "min_keep": 1}, r"cover 16 of the 16 .*targets at most 3"),
    ({"grid": (14, 14), "target_scale": (0.2, 0.5)}, r"432 of the 196 .*at most 46 patches"),
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
  MultiBlock(grid=(7, 7), min_keep=1)
  MultiBlock(grid=(7, 7), targets=3)
  MultiBlock(grid=(4, 4), min_keep=1, targets=3)
  MultiBlock(grid=(8, 8), compat="ijepa", min_keep=5)
  MultiBlock(grid=(12, 12), compat="ijepa", min_keep=9)


@pytest.mark.parametrize(
  "sampler",
  [
    MultiBlock(grid=(4, 4), min_keep=4, targets=3),
    MultiBlock(grid=(1, 6), min_keep=2, targets=2),
    MultiBlock(grid=(8, 8), min_keep=5, compat="ijepa"),
  ],
  ids=["4x4", "1x6", "8x8-ijepa"],
)
def test_small_grids(sampler):
  drawn = draw(sampler, 512)
  context, targets = (member(x, sampler.count) for x in (drawn.context, drawn.targets))
  assert not (context & targets.any(1)).any()
  assert (context.sum(1) >= sampler.min_keep).all() and (targets.sum(2) >= 1).all()


def test_largest_context_occurs_and_is_the_bound():
  """By enumeration of all places on a grid small enough."""
  area, block, target = (5, 6), (4, 4), (3, 2)
  best = 0
  for top, left in np.ndindex(2, 3):
    for y, x in np.ndindex(3, 5):
      inside, hit = np.zeros(area, bool), np.zeros(area, bool)
      inside[top : top + 4, left : left + 4] = True
      hit[y : y + 3, x : x + 2] = True
      best = max(best, (inside & ~hit).sum())
  assert blocks.largest_context([block], [target], area) == best


def test_most_covered_bounds_every_placement():
  """By enumeration of three 3x2 blocks on 5x5, where areas alone would say 18."""
  area, size = (5, 5), (3, 2)
  covers = []
  for y, x in np.ndindex(3, 4):
    cover = np.zeros(area, bool)
    cover[y : y + 3, x : x + 2] = True
    covers.append(cover.ravel())
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
