"""The masks of data2vec 2.0 and DINOv2 against slow forms in plain Python."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from masks_oracle import check_near, draw, member

from jepax.masks import CropBlocks, InverseBlock

# --- inverse blocks -------------------------------------------------------------------------


def slow_inverse(rng: np.random.Generator, grid, ratio: float, adjust: float) -> np.ndarray:
  """The published procedure, one mask: True where visible."""
  n = grid[0] * grid[1]
  visible = np.zeros(grid, bool)
  for _ in range(int(n * (1 - ratio + adjust) / 9)):
    row, column = rng.integers(grid[0]), rng.integers(grid[1])
    for i in (-1, 0, 1):
      for j in (-1, 0, 1):
        visible[np.clip(row + i, 0, grid[0] - 1), np.clip(column + j, 0, grid[1] - 1)] = True
  flat, keep = visible.ravel(), int(n * (1 - ratio))
  while flat.sum() > keep:
    flat[rng.choice(np.flatnonzero(flat))] = False
  while flat.sum() < keep:
    flat[rng.choice(np.flatnonzero(~flat))] = True
  return flat


@pytest.mark.parametrize(
  "grid, ratio, adjust, blocks, visible",
  [  # the published recipes: B/16, L/16 and H/16, H/14
    ((14, 14), 0.8, 0.07, 5, 39),
    ((14, 14), 0.75, 0.1, 7, 49),
    ((16, 16), 0.75, 0.1, 9, 64),
  ],
)
def test_inverse_block_keeps_what_the_recipes_keep(grid, ratio, adjust, blocks, visible):
  sampler = InverseBlock(grid=grid, ratio=ratio, adjust=adjust)
  assert (sampler.blocks, sampler.context_size) == (blocks, visible)
  assert sampler.target_size == sampler.count - visible


def test_inverse_block_splits_every_sample_exactly():
  sampler = InverseBlock(grid=(6, 8), ratio=0.7, copies=3)
  masks = draw(sampler, 200)
  context, hidden = member(masks.context, 48), member(masks.targets, 48)
  assert context.shape == (200, 3, 48)
  assert (context ^ hidden).all()  # exactly one of the two
  assert masks.context.valid.all() and masks.targets.valid.all()
  assert (context.sum(-1) == int(48 * 0.3)).all()
  copies = {tuple(row) for row in context.reshape(-1, 48).tolist()}
  assert len(copies) > 590  # copies of one sample differ too


def test_inverse_block_distribution():
  """Each cell's frequency, and how often its neighbour below is visible too."""
  sampler = InverseBlock(grid=(14, 14))
  found = member(draw(sampler, 4000).context, 196)[:, 0].reshape(-1, 14, 14)
  rng = np.random.default_rng(0)
  slow = np.array([slow_inverse(rng, (14, 14), 0.8, 0.07) for _ in range(4000)])
  slow = slow.reshape(-1, 14, 14)
  for x, y in ((found, slow), (found[:, :-1] & found[:, 1:], slow[:, :-1] & slow[:, 1:])):
    error = np.sqrt(x.var(0) / len(x) + y.var(0) / len(y))
    assert (np.abs(x.mean(0) - y.mean(0)) < 5 * error).all()
  # Far from uniform at the border, by 20,000 draws of the reference.
  for cells, frequency in ((found[:, ::13, ::13], 0.112), (found[:, [1, 12]][..., [1, 12]], 0.220)):
    check_near(cells.reshape(len(found), -1).mean(1), frequency, slack=5e-3)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(grid=(0, 4)), "grid must be two positive numbers"),
    (dict(grid=(4, 4), ratio=1.0), r"ratio must lie in \(0, 1\)"),
    (dict(grid=(2, 2), ratio=0.9), r"keeps 0 of 4 patches.*from 0.25 to 0.75"),
    (dict(grid=(4, 4), block=2), "block must be odd"),
    (dict(grid=(4, 4), block=5), r"block=5 is wider than the grid of \(4, 4\)"),
    (dict(grid=(4, 4), copies=0), "copies at least 1"),
  ],
)
def test_inverse_block_errors(settings, message):
  with pytest.raises(ValueError, match=message):
    InverseBlock(**settings)


# --- blocks on crops ------------------------------------------------------------------------


def slow_blocks(rng: np.random.Generator, grid, wanted: int) -> np.ndarray:
  """The published generator, one mask of `wanted` patches or a few less."""
  hidden = np.zeros(grid, bool)
  while hidden.sum() < wanted:
    missing = wanted - hidden.sum()
    for _ in range(10):
      area = rng.uniform(min(4, missing), max(4, missing))
      ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
      h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
      if h >= grid[0] or w >= grid[1]:
        continue
      top, left = rng.integers(grid[0] - h + 1), rng.integers(grid[1] - w + 1)
      new = h * w - hidden[top : top + h, left : left + w].sum()
      if 0 < new <= missing:
        hidden[top : top + h, left : left + w] = True
        break
    else:
      break
  return hidden.ravel()


def crops(sampler: CropBlocks, count: int) -> np.ndarray:
  """bool[count v n], having checked that contexts are what the targets leave."""
  masks = draw(sampler, count)
  hidden = member(masks.targets, sampler.count)
  assert (member(masks.context, sampler.count) ^ hidden).all()
  assert masks.targets.index.shape[-1] == sampler.target_size
  return hidden


def test_one_crop_of_two_is_masked():
  hidden = crops(CropBlocks(grid=(8, 8)), 1000).sum(-1)
  assert ((hidden > 0).sum(1) == 1).all()
  check_near((hidden[:, 0] > 0).astype(float), 0.5)
  assert hidden.max() <= 32 and CropBlocks(grid=(8, 8)).masked == 1


@pytest.mark.parametrize("share, masked", [(0.3, 1), (0.8, 2)])
def test_shares_between(share, masked):
  sampler = CropBlocks(grid=(6, 6), share=share)
  hidden = crops(sampler, 1000).sum(-1) > 0
  assert sampler.masked == masked and (hidden.sum(1) <= masked).all()
  check_near(hidden.mean(1), share)


def test_crop_blocks_distribution():
  """The number of patches hidden, each cell's frequency, and pairs of neighbours."""
  grid = (8, 8)
  found = crops(CropBlocks(grid=grid, crops=1, share=1.0), 4000)[:, 0].reshape(-1, *grid)
  rng = np.random.default_rng(0)
  wanted = [int(64 * rng.uniform(0.1, 0.5)) for _ in range(4000)]
  slow = np.array([slow_blocks(rng, grid, k) for k in wanted]).reshape(-1, *grid)
  assert slow.reshape(4000, -1).sum(1).tolist() != wanted  # some are underfilled
  for f in (
    lambda x: x.sum((1, 2)).astype(float),
    lambda x: (x.sum((1, 2)) ** 2).astype(float),
    lambda x: x,
    lambda x: x[:, :-1] & x[:, 1:],
    lambda x: x[:, :, :-1] & x[:, :, 1:],
  ):
    x, y = f(found), f(slow)
    error = np.sqrt(x.var(0) / len(x) + y.var(0) / len(y))
    assert (np.abs(x.mean(0) - y.mean(0)) < 5 * error).all()


def test_complete_masks_have_the_number_drawn():
  sampler = CropBlocks(grid=(8, 8), crops=1, share=1.0, ratio=(0.25, 0.25), complete=True)
  assert (crops(sampler, 500).sum(-1) == 16).all()
  short = crops(CropBlocks(grid=(8, 8), crops=1, share=1.0, ratio=(0.25, 0.25)), 500).sum(-1)
  assert short.min() < 16 == short.max()


def test_a_sample_keeps_its_masks_in_any_batch():
  keys = jax.random.split(jax.random.key(3), 6)
  for sampler in (CropBlocks(grid=(5, 5)), InverseBlock(grid=(5, 5), copies=2)):
    whole, part = (jax.jit(sampler)(k, keys[0]) for k in (keys, keys[2:4]))
    np.testing.assert_array_equal(whole.targets.index[2:4], part.targets.index)


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(grid=(1, 4)), "from 2 on"),
    (dict(grid=(4, 4), share=0.0), r"share in \(0, 1\]"),
    (dict(grid=(4, 4), ratio=(0.5, 0.1)), "0 <= low <= high <= 1"),
    (dict(grid=(2, 2), ratio=(0.0, 0.2)), "hides less than one of 4 patches; raise it to 0.25"),
    (dict(grid=(4, 4), aspect=2.0), r"aspect in \(0, 1\]"),
    (dict(grid=(4, 4), smallest=9), r"smallest=9 .* more than the 8 that .* hides of 16"),
  ],
)
def test_crop_blocks_errors(settings, message):
  with pytest.raises(ValueError, match=message):
    CropBlocks(**settings)
