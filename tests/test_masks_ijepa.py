"""compat='ijepa' against the reference's formula and what was measured of its sampler."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from masks_oracle import check_frequencies, check_near, coverage, draw, draw_steps, member, sides

from jepax.masks import MultiBlock, blocks

STEPS, BATCH = 400, 128  # the reference's batch per GPU for ViT-H/14

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
