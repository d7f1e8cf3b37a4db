"""Models against an oracle, known sizes, and what must not change a number."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import models_oracle as oracle
import numpy as np
import pytest
from flax import linen as nn

from jepax.masks.tokens import TokenSet
from jepax.models.activations import ACTIVATIONS, gelu
from jepax.models.decoder import PixelDecoder
from jepax.models.heads import MLP, BatchNorm
from jepax.models.norms import LayerNorm
from jepax.models.predictor import Predictor
from jepax.models.transformer import Block, layer_norm
from jepax.models.vit import ViT, patchify, sincos2d, unpatchify, vit

# Float32 through two blocks, on outputs of order 1, summed in another order.
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)

GRID = (3, 4)  # rows and columns differ, so that mixing them up shows
ENCODER = ViT(patch=2, width=16, depth=2, heads=2, mlp_width=24)
MAE_ENCODER = ENCODER.clone(class_token=True)
PREDICTOR = Predictor(width=8, depth=2, heads=2)
DECODER = PixelDecoder(out=12, width=8, depth=2, heads=2)


def randomized(shapes, *, seed: int = 0):
  """Every parameter drawn, biases and scales too: the usual start would hide their mistakes."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.3).astype(np.float32), shapes)


def parameters(module, *inputs, seed: int = 0, **keywords):
  init = functools.partial(module.init, jax.random.key(0), **keywords)
  return randomized(jax.eval_shape(init, *inputs)["params"], seed=seed)


def tokens(*rows, size: int | None = None, filler: int = 5) -> TokenSet:
  """Sets of these indices, each padded to `size` with an index that is there but not valid."""
  size = size or max(len(row) for row in rows)
  index = [[*row, *[filler] * (size - len(row))] for row in rows]
  valid = [[i < len(row) for i in range(size)] for row in rows]
  return TokenSet(jnp.asarray(index, jnp.int32), jnp.asarray(valid))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
  return np.random.default_rng(1).normal(size=(2, 6, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def encoder(images):
  """(parameters, jitted encoder) of ENCODER."""
  params = parameters(ENCODER, images)
  return params, jax.jit(lambda *arguments: ENCODER.apply({"params": params}, *arguments))


@pytest.fixture(scope="module")
def predictor():
  """(parameters, context [b k d], jitted (context, ids, targets) -> prediction) of PREDICTOR."""
  context = np.random.default_rng(2).normal(size=(2, 4, 16)).astype(np.float32)
  ids = tokens([0, 1, 2, 3], [4, 5, 6, 7])
  targets = jax.tree.map(lambda x: x[:, None], ids)
  params = parameters(PREDICTOR, context, ids, targets, grid=GRID)
  return (
    params,
    context,
    jax.jit(lambda *arguments: PREDICTOR.apply({"params": params}, *arguments, grid=GRID)),
  )


# --- sizes ----------------------------------------------------------------------------------


def count(module, *inputs, **keywords) -> int:
  init = functools.partial(module.init, jax.random.key(0), **keywords)
  shapes = jax.eval_shape(init, *inputs)["params"]
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def image_of(size: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


@pytest.mark.parametrize(
  "variant, patch, millions",
  [
    ("tiny", 16, 5.49),
    ("small", 16, 21.6),
    ("base", 16, 85.6),
    ("large", 16, 303.1),
    ("huge", 14, 630.4),
    ("huge", 16, 630.7),
    ("giant", 16, 1011.1),
  ],
)
def test_encoder_sizes(variant, patch, millions):
  found = count(vit(variant, patch=patch, scan=True), image_of(224)) / 1e6
  digits = 2 if variant == "tiny" else 1
  assert round(found, digits) == millions


@pytest.mark.parametrize(
  "width, heads, depth, millions",
  [(768, 12, 6, 11.2), (1024, 16, 12, 22.1), (1280, 16, 12, 22.3), (1408, 16, 16, 29.5)],
)
def test_predictor_sizes(width, heads, depth, millions):
  context = tokens([0, 1])
  targets = tokens([2])
  targets = jax.tree.map(lambda x: x[:, None], targets)
  model = Predictor(width=384, depth=depth, heads=heads, scan=True)
  x = jax.ShapeDtypeStruct((1, 2, width), jnp.float32)
  assert round(count(model, x, context, targets, grid=(14, 14)) / 1e6, 1) == millions


@pytest.mark.parametrize(
  "variant, patch, encoder_size, decoder_size",
  [
    ("base", 16, 85_647_360, 26_008_320),
    ("large", 16, 303_099_904, 26_139_392),
    ("huge", 14, 630_435_840, 26_178_124),
  ],
)
def test_mae_sizes(variant, patch, encoder_size, decoder_size):
  model = vit(variant, patch=patch, class_token=True, scan=True)
  assert count(model, image_of(224)) == encoder_size
  decoder = PixelDecoder(out=3 * patch**2, width=512, depth=8, heads=16, scan=True)
  x = jax.ShapeDtypeStruct((1, 3, model.width), jnp.float32)
  assert count(decoder, x, tokens([0, 1]), tokens([2]), grid=(14, 14)) == decoder_size


def test_expander_size_is_the_references():
  x = jax.ShapeDtypeStruct((2, 2048), jnp.float32)
  assert count(MLP(widths=(8192, 8192, 8192)), x) == 151_044_096


# --- patches and positions ------------------------------------------------------------------


def test_patchify_order():
  images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  patches = patchify(images, patch=2)
  assert patches.shape == (2, 6, 12)
  for b, r, c, y, x, z in np.ndindex(2, 2, 3, 2, 2, 3):  # row, column, channel inside a patch
    assert patches[b, 3 * r + c, 6 * y + 3 * x + z] == images[b, 2 * r + y, 2 * c + x, z]
  with pytest.raises(ValueError, match="images of 4x6 pixels do not divide into patches of 4"):
    patchify(images, patch=4)
  np.testing.assert_array_equal(unpatchify(patches, grid=(2, 3), patch=2), images)
  for wrong in ({"grid": (2, 2), "patch": 2}, {"grid": (2, 3), "patch": 5}):
    with pytest.raises(ValueError, match="6 patches of 12 values make no image of"):
      unpatchify(patches, **wrong)


@pytest.mark.parametrize("grid, width", [((3, 4), 8), ((5, 2), 12)])
def test_positions(grid, width):
  table = sincos2d(grid, width)
  assert table.dtype == np.float32
  for row, column in np.ndindex(*grid):
    expected = oracle.position(row, column, width)
    np.testing.assert_allclose(table[row * grid[1] + column], expected, atol=1e-7)
  # The first half is the column's: constant down a column.
  by_place = table.reshape(*grid, width)
  assert np.ptp(by_place[..., : width // 2], axis=0).max() == 0
  assert np.ptp(by_place[..., width // 2 :], axis=1).max() == 0
  with pytest.raises(ValueError, match=r"width=6: .*multiple of 4; nearest: \[4, 8\]"):
    sincos2d(grid, 6)


# --- against the oracle ---------------------------------------------------------------------


def test_encoder_is_the_oracles(encoder, images):
  params, encode = encoder
  for found, image in zip(encode(images), images, strict=True):
    close(found, oracle.vit(params, image, patch=2, heads=2))


def test_encoder_of_some_patches_is_the_oracles(encoder, images):
  """Only those patches exist for it: positions kept, padding and absent patches unseen."""
  params, encode = encoder
  sets = [[7, 2, 11], [0, 9, 3, 8, 4]]
  found = encode(images, tokens(*sets))
  for i, ids in enumerate(sets):
    close(found[i, : len(ids)], oracle.vit(params, images[i], patch=2, heads=2, ids=ids))


def test_mae_is_the_oracles(images):
  visible, hidden = [[8, 1, 5], [2, 3]], [[0, 11], [7, 4, 6, 9]]
  seen, unseen = tokens(*visible), tokens(*hidden)
  params = parameters(MAE_ENCODER, images)
  x = jax.jit(MAE_ENCODER.apply)({"params": params}, images, seen)
  decoder_params = parameters(DECODER, x, seen, unseen, grid=GRID)
  decode = jax.jit(functools.partial(DECODER.apply, grid=GRID))
  found = decode({"params": decoder_params}, x, seen, unseen)
  for i, (ids, missing) in enumerate(zip(visible, hidden, strict=True)):
    latent = oracle.vit(params, images[i], patch=2, heads=2, ids=ids)
    close(x[i, : 1 + len(ids)], latent)
    expected = oracle.decoder(decoder_params, latent, ids, missing, columns=GRID[1], heads=2)
    close(found[i, : len(missing)], expected)


def test_predictor_is_the_oracles(predictor):
  params, context, predict = predictor
  ids, blocks = [[4, 0, 9], [1, 7, 2, 3]], [[[5, 6], [8]], [[0], [11, 10, 5]]]
  targets = jax.tree.map(lambda *x: jnp.stack(x), *[tokens(*b, size=3) for b in blocks])
  found = predict(context, tokens(*ids), targets)
  for b, m in np.ndindex(2, 2):
    x = context[b, : len(ids[b])]
    expected = oracle.predictor(params, x, ids[b], blocks[b][m], columns=GRID[1], heads=2)
    close(found[b, m, : len(blocks[b][m])], expected)


def test_norms_have_the_fields_epsilon():
  """At a variance of 1e-6 the epsilon is half of all; elsewhere it can't be seen."""
  norm = layer_norm(Block(heads=1, mlp_width=1), "norm", jnp.float32)
  x = jnp.asarray([[1e-3, -1e-3]])
  out, _ = norm.init_with_output(jax.random.key(0), x)
  np.testing.assert_allclose(out, [[0.5**0.5, -(0.5**0.5)]], rtol=1e-5)


def test_exact_and_approximate_gelu():
  x = np.linspace(-4, 4, 41)
  np.testing.assert_allclose(ACTIVATIONS["gelu"](x), oracle.gelu(x), atol=1e-6)
  difference = np.abs(ACTIVATIONS["gelu_tanh"](x) - oracle.gelu(x)).max()
  assert 1e-5 < difference < 1e-3


# --- what must not matter -------------------------------------------------------------------


def test_order_of_patches_does_not_matter(encoder, images):
  _, encode = encoder
  order = np.asarray([3, 0, 4, 1, 2])
  ids = np.asarray([[7, 2, 11, 5, 0], [0, 9, 3, 8, 4]])
  first, second = encode(images, tokens(*ids)), encode(images, tokens(*ids[:, order]))
  close(second, first[:, order])


def test_padding_never_changes_an_output(encoder, predictor, images):
  _, encode = encoder
  _, context, predict = predictor
  same = functools.partial(close, rtol=1e-6, atol=1e-6)  # sums over other lengths
  sets = [[7, 2, 11], [0, 9, 3, 8]]
  tight, loose = (encode(images, tokens(*sets, size=n, filler=11 - n)) for n in (5, 9))
  for i, ids in enumerate(sets):
    same(loose[i, : len(ids)], tight[i, : len(ids)])

  def prediction(extra: int):
    blocks = tokens([5, 6], [1, 2], size=3 + extra)
    targets = jax.tree.map(lambda x: jnp.stack([x, x]), blocks)
    padded = np.pad(context, ((0, 0), (0, extra), (0, 0)), constant_values=1e3)
    return predict(padded, tokens(*sets, size=4 + extra), targets)[:, :, :2]

  same(prediction(5), prediction(0))


def test_a_set_without_tokens_stays_finite(encoder, images):
  _, encode = encoder
  out = encode(images, tokens([], [1, 2], size=5))
  assert np.all(np.isfinite(out))


def test_target_blocks_are_sequences_of_their_own(predictor):
  _, context, predict = predictor
  ids = tokens([0, 1, 2, 3], [4, 5, 6, 7])

  def prediction(*blocks):
    return predict(context, ids, jax.tree.map(lambda x: jnp.stack([x, x]), tokens(*blocks)))

  found = prediction([8, 9, 10], [5, 6, 11])
  moved = prediction([8, 9, 10], [3, 1, 2])
  close(moved[:, 0], found[:, 0], rtol=1e-6, atol=1e-6)
  assert np.abs(moved[:, 1] - found[:, 1]).max() > 1e-2
  permuted = prediction([10, 8, 9], [5, 6, 11])
  close(permuted[:, 0], found[:, 0, [2, 0, 1]])


# --- construction ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"heads": 3}, "width=16 does not divide into heads=3"),
    ({"heads": 0}, "does not divide into heads=0"),
    ({"activation": "gleu"}, "activation='gleu' is unknown; did you mean 'gelu'"),
    ({"init_name": "xaver"}, "init_name='xaver' is unknown; did you mean 'xavier'"),
    ({"attention": "cuda"}, "attention='cuda' is unknown.*'cudnn'"),
    ({"remat": "ful"}, "remat='ful' is unknown; did you mean 'full'"),
    ({"width": 0}, "width must be at least 1, found 0"),
    ({"depth": 0}, "depth must be at least 1, found 0"),
    ({"mlp_width": -4}, "mlp_width must be at least 1, found -4"),
    ({"norm_epsilon": 0.0}, "norm_epsilon must be above 0"),
    ({"registers": -1}, "registers at least 0"),
    ({"width": 18}, r"width=18: .*multiple of 4; nearest: \[16, 20\]"),
  ],
)
def test_settings_are_checked_when_built(changes, message):
  with pytest.raises(ValueError, match=message):
    ENCODER.clone(**changes)


def test_variants_can_be_resized():
  model = vit("tiny", patch=4, depth=2, mlp_width=96)
  assert (model.width, model.depth, model.heads, model.mlp_width) == (192, 2, 3, 96)
  with pytest.raises(ValueError, match="variant='hug' is unknown; did you mean 'huge'"):
    vit("hug", patch=4)


def test_heads_have_batch_statistics():
  x = jnp.asarray(np.random.default_rng(5).normal(size=(6, 3)) * 5 + 2, jnp.float32)

  def standard(x):
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)

  for norm in ("none", "plain", "affine"):
    model = MLP(widths=(8, 4), out_norm=norm)
    p = parameters(model, x)
    assert set(p["out"]) == {"kernel"}  # no bias at the end
    hidden = standard(oracle.linear(p["dense0"], np.asarray(x, np.float64)))
    hidden = hidden * p["bn0"]["scale"] + p["bn0"]["bias"]
    expected = np.maximum(hidden, 0) @ p["out"]["kernel"]
    if norm != "none":
      expected = standard(expected)
    if norm == "affine":
      expected = expected * p["out_bn"]["scale"] + p["out_bn"]["bias"]
    close(jax.jit(model.apply)({"params": p}, x), expected)


def test_what_heads_refuse():
  with pytest.raises(ValueError, match="out_norm='batch' is unknown"):
    MLP(widths=(8,), out_norm="batch")
  with pytest.raises(ValueError, match=r"at least 1, found \(8, 0\)"):
    MLP(widths=(8, 0))


def test_batch_norm_of_a_constant_feature_is_zero():
  x = jnp.full((4, 2), 1e4)
  out, grad = jax.value_and_grad(lambda x: jnp.square(BatchNorm(affine=False).apply({}, x)).sum())(
    x
  )
  assert out == 0 and np.all(np.isfinite(grad))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_gradient_equal_jax(dtype):
  x = jnp.linspace(-8, 8, 4001).astype(dtype)
  plain = functools.partial(jax.nn.gelu, approximate=False)
  wide = x.astype(jnp.float32)
  # Rounded are what is given back and, by a unit in the last place of 1, the 1 + erf that x takes.
  tolerance = dict(rtol=float(jnp.finfo(dtype).eps), atol=8 * float(jnp.finfo(jnp.float32).eps))
  np.testing.assert_allclose(gelu(x).astype(jnp.float32), plain(wide), **tolerance)
  slope = jax.grad(lambda x: gelu(x).astype(jnp.float32).sum())(x)
  assert slope.dtype == dtype
  expected = jax.grad(lambda x: plain(x).sum())(wide)
  np.testing.assert_allclose(slope.astype(jnp.float32), expected, **tolerance)


def test_gelu_keeps_its_input_alone():
  """Backward takes an erf of its own: one for both passes would be kept, as large as the input."""

  def loss(x, w):
    return jnp.square(gelu(x) @ w).sum()

  x = jnp.ones((8, 8))
  program = jax.jit(jax.value_and_grad(loss)).lower(x, x).compile().as_text()
  assert program.count(" erf(") == 2


@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("float32", "bfloat16"), ("bfloat16",) * 2])
def test_layer_norm_and_its_gradient_equal_flax(dtypes):
  source, target = map(jnp.dtype, dtypes)
  rng = np.random.default_rng(0)
  x = jnp.asarray(3 + 2 * rng.normal(size=(2, 3, 16)), source)
  g = jnp.asarray(rng.normal(size=x.shape), target)
  params = dict(zip(("bias", "scale"), rng.normal(size=(2, 16)).astype(np.float32), strict=True))

  def run(norm, x, g):
    y, back = jax.vjp(lambda x, params: norm.apply({"params": params}, x), x, params)
    return [y, *jax.tree.leaves(back(g))]

  found = run(LayerNorm(epsilon=1e-3, dtype=target), x, g)
  wide = (array.astype(jnp.float32) for array in (x, g))
  expected = run(nn.LayerNorm(epsilon=1e-3, use_fast_variance=False), *wide)
  assert [leaf.dtype for leaf in found] == [target, source, jnp.float32, jnp.float32]
  shapes = jax.eval_shape(LayerNorm().init, jax.random.key(0), x)["params"]
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
  for a, b in zip(found, expected, strict=True):  # each rounded once, to its own type
    eps = float(jnp.finfo(a.dtype).eps)
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=eps, atol=8 * eps * np.abs(b).max())
