"""Transformer: the switches that must not change a number, attention, precision, first weights."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pretend_gpu
import pytest

from jepax.models import transformer
from jepax.models.attention import attention
from jepax.models.transformer import Block, Transformer
from jepax.models.vit import ViT

DEPTH = 2
STACK = Transformer(width=16, depth=DEPTH, heads=2, mlp_width=24)


def randomized(module, *inputs):
  """Parameters all drawn, biases and scales too: the usual start would hide their mistakes."""
  rng = np.random.default_rng(7)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  return jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.3).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def stack():
  """(parameters, input [b n d], validity [b n]) of STACK."""
  rng = np.random.default_rng(3)
  x = rng.normal(size=(2, 5, 16)).astype(np.float32)
  return randomized(STACK, x), x, np.asarray([[True] * 5, [True, True, False, True, False]])


def stacked(params):
  """The parameters `block0`, `block1`, ... as a scanned stack holds them."""
  layers = [params[f"block{i}"] for i in range(DEPTH)]
  return {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}


def gradients(module, params, x, valid):
  """(output, gradients by parameters and input) of a loss over the last two tokens."""

  def loss(params, x):
    y = module.apply({"params": params}, x, valid, keep=2)
    return jnp.sum(y**2 * np.linspace(-1, 1, 16)), y

  grads, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
  return y, grads


@pytest.fixture(scope="module")
def expected(stack):
  """`gradients` of the plain form: unrolled, all activations kept."""
  return gradients(STACK, *stack)


@pytest.mark.parametrize("scan, remat", [(False, "full"), (True, "none"), (True, "dots")])
def test_scan_and_remat_change_nothing(stack, expected, scan, remat):
  params, x, valid = stack
  y, (grads, x_grad) = expected
  module = STACK.clone(scan=scan, remat=remat)
  if scan:
    params, grads = stacked(params), stacked(grads)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)
  found, found_grads = gradients(module, params, x, valid)
  np.testing.assert_allclose(found, y, rtol=2e-5, atol=2e-5)
  flat = (jax.tree.leaves(tree) for tree in (found_grads, (grads, x_grad)))
  for a, b in zip(*flat, strict=True):
    # Float32 sums in another order; small entries are differences of large ones.
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("scan", [False, True])
def test_keep_is_a_slice(stack, scan):
  params, x, valid = stack
  module = STACK.clone(scan=scan)
  variables = {"params": stacked(params) if scan else params}
  apply = jax.jit(module.apply, static_argnames="keep")
  whole, kept = apply(variables, x, valid), apply(variables, x, valid, keep=2)
  np.testing.assert_allclose(kept, whole[:, -2:], rtol=2e-5, atol=2e-5)


def test_remat_stores_less(stack):
  """That the switch does something: saved residuals of the backward pass, 'full' < 'none'."""
  params, x, valid = stack

  def saved(remat: str) -> int:
    module = STACK.clone(remat=remat)
    pull = jax.eval_shape(
      lambda params: jax.vjp(lambda p: module.apply({"params": p}, x, valid), params)[1], params
    )
    return sum(leaf.size for leaf in jax.tree.leaves(pull))

  assert saved("full") < saved("dots") < saved("none")


# --- attention and precision ----------------------------------------------------------------


def heads(queries: int, keys: int, *, width: int = 24, dtype: str = "bfloat16"):
  """Shapes of q, k, v and validity."""
  q, k = (jax.ShapeDtypeStruct((4, n, 2, width), dtype) for n in (queries, keys))
  return q, k, k, jax.ShapeDtypeStruct((4, keys), bool)


@pytest.mark.parametrize("masked", [True, False])
def test_on_a_gpu_attention_is_cudnns_where_it_serves(masked):
  def loss(q, k, v, valid):
    return attention(q, k, v, valid=valid if masked else None).astype(jnp.float32).sum()

  gradient = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))
  with pretend_gpu.one() as written_out:
    assert pretend_gpu.cudnn_calls(gradient(*heads(6, 8))) == (1, 1)
    assert written_out == []
    for refused in (heads(6, 9), heads(5, 8), heads(6, 8, width=20), heads(6, 8, dtype="float32")):
      assert pretend_gpu.cudnn_calls(gradient(*refused)) == (0, 0)
  assert len(written_out) == 4


@pytest.mark.parametrize("scan", [False, True])
def test_an_even_number_of_tokens_for_cudnn_changes_nothing(stack, expected, monkeypatch, scan):
  """Of five tokens, three kept: results, gradients, and what is sown."""
  params, x, valid = stack
  module, seen = STACK.clone(scan=scan), []
  weights = stacked(params) if scan else params

  def run(valid, **options):
    return jax.jit(lambda w: module.apply({"params": w}, x, valid, **options))(weights)

  def recorded(q, k, v, *, valid, implementation):
    seen.append((q.shape[1], k.shape[1]))
    return attention(q, k, v, valid=valid)

  before, layers = run(valid, mutable=["intermediates", "mlp"]), run(None, last=2)
  monkeypatch.setattr(transformer, "fused", lambda *_, **__: True)
  monkeypatch.setattr(transformer, "attention", recorded)
  after = run(valid, mutable=["intermediates", "mlp"])
  chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
  chex.assert_trees_all_close(after, before, rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(run(None, last=2), layers, rtol=2e-5, atol=2e-5)
  kept = run(valid, keep=3)
  np.testing.assert_allclose(kept, before[0][:, -3:], rtol=2e-5, atol=2e-5)
  assert {number % 2 for pair in seen for number in pair} == {0}
  y, (grads, x_grad) = expected
  found, found_grads = gradients(module, weights, x, valid)
  np.testing.assert_allclose(found, y, rtol=2e-5, atol=2e-5)
  flat = (jax.tree.leaves(t) for t in (found_grads, (stacked(grads) if scan else grads, x_grad)))
  for a, b in zip(*flat, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_a_gpus_products_apart_are_the_same(stack, expected, monkeypatch):
  """Queries, keys and values of one product a piece, as whole arrays, there."""
  monkeypatch.setattr(transformer, "platform", lambda: "gpu")
  params, x, valid = stack
  y, grads = gradients(STACK.clone(), params, x, valid)
  np.testing.assert_allclose(y, expected[0], rtol=2e-5, atol=2e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_attention_implementations_agree():
  rng = np.random.default_rng(4)
  q = rng.normal(size=(2, 3, 2, 8)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 5, 2, 8)).astype(np.float32)
  for valid in (None, jnp.asarray([[True, False, True, True, False], [False] * 4 + [True]])):
    plain, xla, auto = (
      attention(q, k, v, valid=valid, implementation=name) for name in ("plain", "xla", "auto")
    )
    np.testing.assert_allclose(plain, xla, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(auto, plain)  # no GPU here
  np.testing.assert_allclose(plain[1], np.broadcast_to(v[1, 4], (3, 2, 8)), rtol=1e-6)
  with pytest.raises(ValueError, match="attention='flash' is unknown"):
    attention(q, k, v, implementation="flash")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_plain_attention(masked, dtype):
  """Written by hand there; here of the formula, differentiated by JAX in float32."""
  rng = np.random.default_rng(7)
  q, g = jnp.asarray(rng.normal(size=(2, 2, 3, 2, 8)), dtype)
  k, v = jnp.asarray(rng.normal(size=(2, 2, 5, 2, 8)), dtype)
  valid = jnp.asarray([[True, False, True, True, False], [False] * 4 + [True]]) if masked else None

  def formula(q, k, v):
    logits = jnp.einsum("bnhe,bmhe->bhnm", q, k) / np.sqrt(8)
    if masked:
      logits = jnp.where(valid[:, None, None], logits, -jnp.inf)
    return jnp.einsum("bhnm,bmhe->bnhe", jax.nn.softmax(logits), v)

  wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
  expected = jax.vjp(formula, *wide[:3])[1](wide[3])
  found = jax.vjp(lambda *x: attention(*x, valid=valid, implementation="plain"), q, k, v)[1](g)
  # Sums of up to eight products of factors that are rounded once or twice on the way.
  atol = 8 * float(jnp.finfo(dtype).eps)
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=1e-5, atol=atol * np.abs(b).max())


@pytest.mark.parametrize("implementation", ["plain", "xla"])
def test_softmax_of_bfloat16_is_in_float32(implementation):
  """Logits near 60 in bfloat16 would be off by up to 1/8, and weights by a tenth."""
  rng = np.random.default_rng(6)
  q, k = (jnp.asarray(4 + rng.normal(size=(1, n, 1, 16)), jnp.bfloat16) for n in (4, 6))
  v = jnp.eye(6, 16, dtype=jnp.bfloat16)[None, :, None]  # reads the weights out
  found = attention(q, k, v, implementation=implementation)
  assert found.dtype == jnp.bfloat16
  logits = np.asarray(q, np.float64)[0, :, 0] @ np.asarray(k, np.float64)[0, :, 0].T / 4
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  # One rounding of the weight to eight bits, one of the output.
  np.testing.assert_allclose(np.asarray(found, np.float64)[0, :, 0, :6], weights, rtol=2**-7)


def test_bfloat16_products_on_float32_parameters():
  images = np.random.default_rng(1).normal(size=(2, 6, 8, 3)).astype(np.float32)
  encoder = ViT(patch=2, width=16, depth=2, heads=2)
  half = encoder.clone(dtype=jnp.bfloat16)
  params = randomized(encoder, images)
  shapes = jax.eval_shape(half.init, jax.random.key(0), images)["params"]
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  found = jax.jit(half.apply)({"params": params}, images)
  full = jax.jit(encoder.apply)({"params": params}, images)
  assert found.dtype == jnp.float32
  error = np.abs(found - full).max() / np.std(full)
  assert 1e-4 < error < 0.1  # eight bits of mantissa through two blocks, and used at all


# --- initialisation -------------------------------------------------------------------------


@pytest.mark.parametrize("init_name", ["normal", "xavier"])
def test_initialisation(init_name):
  model = ViT(patch=4, width=64, depth=1, heads=2, init_name=init_name, class_token=True)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  flat = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
  for path, leaf in flat.items():
    if path.endswith("['bias']"):
      assert not np.any(leaf), path
    elif path.endswith("['scale']"):
      assert np.all(leaf == 1), path
    elif path.endswith("['kernel']"):
      uniform = np.sqrt(6 / sum(leaf.shape))  # fan in and fan out of the whole matrix, q, k, v too
      std = 0.02 if init_name == "normal" else uniform / np.sqrt(3)
      np.testing.assert_allclose(np.std(leaf), std, rtol=0.05)  # of 3,000 draws and more
      # Plain normal draws pass three deviations, which truncation at two would not.
      assert (np.abs(leaf).max() > 3 * std) == (init_name == "normal")
  np.testing.assert_allclose(np.std(flat["['class_token']"]), 0.02, rtol=0.3)  # of 64 draws


FULL = ViT(
  patch=4, width=16, depth=DEPTH, heads=2, mlp_width=24, class_token=True, registers=2,
  mask_token=True, position="learned", grid=(2, 2), layer_scale=0.1, activation="swiglu",
)  # fmt: skip


@pytest.fixture(scope="module")
def full():
  """(parameters, images) of FULL, an encoder with every part there is."""
  images = np.random.default_rng(4).normal(size=(3, 8, 8, 3)).astype(np.float32)
  return randomized(FULL, images), images


def test_vit_with_every_part(full):
  """Class token, registers, learned positions and mask token each reach what they should."""
  params, images = full

  @jax.jit
  def encode(params, images, hidden=None):
    return FULL.apply({"params": params}, images, hidden=hidden)

  x = encode(params, images)
  assert x.shape == (3, FULL.prefix + 4, 16) and FULL.prefix == 3

  pixels = images[0, :4, :4].reshape(-1)
  patch = pixels @ params["embed"]["kernel"] + params["embed"]["bias"] + params["position"][1]
  first = params["class_token"][0] + params["position"][:1]
  embedded = jnp.concatenate([first, params["registers"][0], patch[None]])
  blocks = Transformer(width=16, depth=DEPTH, heads=2, mlp_width=24, layer_scale=0.1,
                       activation="swiglu")  # fmt: skip
  one = FULL.clone(grid=(1, 1))
  cut = {**params, "position": params["position"][:2]}
  y = blocks.apply({"params": params["transformer"]}, embedded[None])
  y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-6)
  y = y * params["norm"]["scale"] + params["norm"]["bias"]
  found = one.apply({"params": cut}, images[:1, :4, :4])
  np.testing.assert_allclose(found, y, atol=2e-5)  # rounding of O(1) activations

  hidden = np.zeros((3, 4), bool)
  np.testing.assert_array_equal(encode(params, images, hidden), x)
  hidden[0, 1] = True  # the upper right patch: its pixels no longer count
  changed = images.copy()
  changed[0, :4, 4:] += 1.0
  np.testing.assert_array_equal(encode(params, changed, hidden), encode(params, images, hidden))
  assert np.abs(encode(params, images, hidden)[0] - x[0]).max() > 1e-2
  with pytest.raises(ValueError, match=r"grid of \(2, 2\) patches"):
    FULL.apply({"params": params}, images[:, :4])


def test_swiglu_and_layer_scale():
  """silu(a) * b over halves of fc1, and a factor a channel on both branches, written out."""
  block = Block(heads=1, mlp_width=6, activation="swiglu", layer_scale=0.5)
  x = np.random.default_rng(5).normal(size=(1, 3, 4)).astype(np.float32)
  params = jax.tree.map(jnp.asarray, randomized(block, x, None))
  muted = {**params, "scale1": jnp.zeros(4)}  # leaves x + scale2 * mlp(norm(x))
  h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  h = h * params["norm2"]["scale"] + params["norm2"]["bias"]
  h = h @ params["fc1"]["kernel"] + params["fc1"]["bias"]
  h = h[..., :6] / (1 + np.exp(-h[..., :6])) * h[..., 6:]
  h = h @ params["fc2"]["kernel"] + params["fc2"]["bias"]
  y = block.apply({"params": muted}, x, None)
  np.testing.assert_allclose(y, x + params["scale2"] * h, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_last_layers(stack, scan):
  """The last of `last` layers is the output; the one before is what a shallower stack gives."""
  params, x, valid = stack
  module = STACK.clone(scan=scan)
  weights = stacked(params) if scan else params
  layers = module.apply({"params": weights}, x, valid, last=2)
  np.testing.assert_array_equal(layers[-1], module.apply({"params": weights}, x, valid))
  first = STACK.clone(depth=1).apply({"params": {"block0": params["block0"]}}, x, valid)
  np.testing.assert_allclose(layers[0], first, atol=1e-6)
  with pytest.raises(ValueError, match=r"last must lie in 1\.\.2"):
    module.apply({"params": weights}, x, valid, last=3)


@pytest.mark.parametrize("scan", [False, True])
def test_drop_path(stack, scan):
  """Block 0 is never dropped; the last at its rate, whole samples, kept ones scaled up."""
  params, _, _ = stack
  module = STACK.clone(scan=scan, drop_path=0.75)
  params = stacked(params) if scan else params
  x = np.repeat(np.random.default_rng(8).normal(size=(1, 5, 16)), 4000, 0).astype(np.float32)

  @jax.jit
  def run(rngs):
    first, last = module.apply({"params": params}, x, last=2, rngs=rngs)
    return first, last - first

  first, clean = run({})
  same, branches = run({"drop_path": jax.random.key(0)})
  np.testing.assert_allclose(same, first, atol=1e-6)
  branches = np.asarray(branches).reshape(len(x), -1)
  untouched = np.abs(branches).max(1) == 0  # both of its branches dropped
  share = 0.75**2
  error = 5 * np.sqrt(share * (1 - share) / len(x))
  assert abs(untouched.mean() - share) < error, "not 5 standard errors from the rate squared"
  both = np.abs(branches).max(1) > np.abs(np.asarray(clean)[0]).max() * 1.5
  assert both.any(), "kept branches are scaled by 1 / (1 - rate)"
