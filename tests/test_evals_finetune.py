"""Fine-tuning: rates by layer, mixing, untouched encoder, devices, and that it learns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jepax import optim
from jepax.data.augment import Augment
from jepax.evals import finetune
from jepax.evals.finetune import FineTune
from jepax.evals.mixing import Mixing
from jepax.models.vit import ViT
from jepax.pretrained import Encoder, Preprocess
from jepax.sharding import make_mesh

PLAIN = FineTune(
  epochs=1,
  batch_size=16,
  learning_rate=1e-3,
  layer_decay=0.5,
  weight_decay=0.0,
  warmup_epochs=0,
  label_smoothing=0.0,
  head_std=0.02,
  crop_scale=(1.0, 1.0),
  flip=0.0,
)


def make_encoder(**fields):
  module = ViT(patch=4, width=16, depth=2, heads=2, mlp_width=16, **fields)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
  preprocess = Preprocess(size=(16, 16), mean=(0.3,), std=(0.3,))
  return Encoder(module=module, params=params, preprocess=preprocess, name="target")


def copied(tree):
  return jax.tree.map(np.array, tree)


def scanned(encoder):
  """The same encoder with its blocks in one scanned stack."""
  params = dict(encoder.params)
  blocks = [params["transformer"][f"block{i}"] for i in range(2)]
  params["transformer"] = {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
  return dataclasses.replace(encoder, module=encoder.module.clone(scan=True), params=params)


@pytest.mark.parametrize("scan", [False, True])
def test_each_layer_moves_and_decays_at_its_own_rate(scan):
  encoder = make_encoder(class_token=True, registers=1, position="learned", grid=(4, 4))
  encoder = scanned(encoder) if scan else encoder
  params = {"encoder": encoder.params, "head": {"kernel": jnp.ones((16, 4))}}
  grads = jax.tree.map(lambda p: jnp.where(p > 0, 3.0, -2.0), params)
  tx = finetune.optimizer(dataclasses.replace(PLAIN, weight_decay=0.1), steps_per_epoch=1)
  updates, _ = jax.jit(lambda: tx.update(grads, tx.init(params), params))()

  def check(path, update, grad, param):
    names = [key.key for key in path]
    if names[0] == "head" or names[1] == "norm":
      rate = 1.0
    elif names[1] == "transformer":  # 0.5^(3 - layer)
      rates = {"block0": 0.25, "block1": 0.5, "blocks": np.array([0.25, 0.5])}
      rate = np.reshape(rates[names[2]], (-1, *[1] * (param.ndim - 1)) if scan else ())
    else:
      rate = 0.125
    decayed = names[-1] == "kernel"
    # Adam's first step is the gradient's sign. 1e-5: its epsilon of 1e-8, and float32.
    want = -1e-3 * rate * (np.sign(grad) + 0.1 * decayed * np.asarray(param))
    np.testing.assert_allclose(update, want, rtol=1e-5, err_msg=str(names))

  jax.tree_util.tree_map_with_path(check, updates, grads, params)


def test_the_rate_warms_up_from_zero_and_falls_to_its_floor():
  recipe = dataclasses.replace(PLAIN, epochs=3, warmup_epochs=1, final_lr=1e-4, b1=0.0, b2=0.0)
  tx = finetune.optimizer(recipe, steps_per_epoch=2)
  block = {"kernel": jnp.ones(1)}
  params = {"encoder": {"transformer": {"block0": {"fc1": block}}}, "head": {"kernel": jnp.ones(1)}}
  state, found = tx.init(params), []
  for _ in range(7):  # one more than the run has: the floor is where the cosine ends
    updates, state = tx.update(params, state, params)
    found.append(-updates["head"]["kernel"][0])
  falling = 1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi * np.arange(5) / 4))
  np.testing.assert_allclose(found, [0, 5e-4, *falling], rtol=1e-5)  # Adam's epsilon, float32


def test_the_loss_is_of_smoothed_labels_on_the_normed_mean_patch():
  encoder = make_encoder(class_token=True)
  rng = np.random.default_rng(0)
  head = {"kernel": rng.normal(size=(16, 4)), "bias": rng.normal(size=4)}
  scale = {"scale": rng.normal(size=16), "bias": rng.normal(size=16)}
  params = {"encoder": encoder.params, "fc_norm": scale, "head": head}
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  batch = {"image": jnp.asarray(tiny.images(8)), "label": jnp.asarray(tiny.labels(8))}

  def loss(**change):
    recipe = dataclasses.replace(PLAIN, label_smoothing=0.2, **change)
    model = finetune.classifier(encoder, num_classes=4, protocol=recipe)
    supervised = finetune.Supervised(model, Augment(mean=(0.3,), std=(0.3,)), recipe)
    return float(jax.jit(supervised.loss)(params, {}, batch, jax.random.key(0), 0)[0])

  images = encoder.preprocess.normalise(batch["image"])
  bare = encoder.module.clone(final_norm=False)
  tokens = np.asarray(jax.jit(bare.apply)({"params": encoder.params}, images), np.float64)

  def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

  normed = encoder.layers(batch["image"], last=1)[0]  # a fresh norm has scale 1 and bias 0
  np.testing.assert_allclose(norm(tokens), normed, atol=1e-4)  # float32 against float64
  logits = (norm(tokens[:, 1:].mean(1)) * scale["scale"] + scale["bias"]) @ head["kernel"]
  logits = logits + head["bias"]
  targets = 0.8 * np.eye(4)[batch["label"]] + 0.05
  want = (np.log(np.exp(logits).sum(1)) - (targets * logits).sum(1)).mean()
  assert loss() == pytest.approx(want, rel=1e-4)
  assert loss(drop_path=0.9) != pytest.approx(want, rel=1e-3)


def test_layer_scales_follow_the_published_ids():
  leaf = jnp.zeros((2, 3))
  params = {
    "encoder": {
      "embed": {"kernel": leaf},
      "class_token": leaf,
      "norm": {"scale": leaf},
      "transformer": {"block0": {"fc1": {"kernel": leaf}}, "block11": {"norm1": {"scale": leaf}}},
    },
    "head": {"kernel": leaf},
  }
  found = optim.layer_scales(params, decay=0.65)
  assert found == {
    "encoder": {
      "embed": {"kernel": 0.65**13},
      "class_token": 0.65**13,
      "norm": {"scale": 1.0},
      "transformer": {
        "block0": {"fc1": {"kernel": 0.65**12}},
        "block11": {"norm1": {"scale": 0.65}},
      },
    },
    "head": {"kernel": 1.0},
  }


def test_it_learns_with_all_of_a_recipe_and_says_how():
  recipe = dataclasses.replace(
    PLAIN,
    epochs=12,
    learning_rate=3e-3,
    layer_decay=0.9,
    weight_decay=0.05,
    warmup_epochs=2,
    label_smoothing=0.1,
    drop_path=0.1,
    fc_norm=False,
    crop_scale=(0.8, 1.0),
    mixing=Mixing(mixup=0.2, cutmix=0.2, prob=0.3),
  )
  encoder = make_encoder()
  before = copied(encoder.params)
  tuned = finetune.fit(
    encoder, tiny.images(128), tiny.labels(128), num_classes=4, protocol=recipe, seed=0
  )
  jax.tree.map(np.testing.assert_array_equal, copied(encoder.params), before)
  assert tuned.losses.shape == (96,) and tuned.skipped == 0
  # Medians: the few mixed batches have a loss that nothing can fit.
  assert np.median(tuned.losses[-16:]) < 0.7 * np.median(tuned.losses[:16])
  held = tiny.images(60, seed=1), tiny.labels(60)
  assert finetune.accuracy(tuned, *held, batch_size=32) > 0.9
  assert finetune.predict(tuned, held[0], batch_size=32).shape == (60,)
  assert "norm" in tuned.params["encoder"] and "fc_norm" not in tuned.params


def test_scanned_on_four_devices_equals_unrolled_on_one():
  encoder = make_encoder()
  x, y = tiny.images(48), tiny.labels(48)
  recipe = dataclasses.replace(PLAIN, mixing=Mixing(mixup=0.8, cutmix=1.0), flip=0.5)
  fit = {"num_classes": 4, "protocol": recipe, "seed": 0}
  alone = finetune.fit(encoder, x, y, **fit)
  assert "norm" not in alone.params["encoder"] and "fc_norm" in alone.params
  mesh = make_mesh(devices=jax.devices()[:4])
  split = finetune.fit(scanned(encoder), x, y, **fit, mesh=mesh)
  # 1e-5: float32 sums over the batch in another order, three steps long.
  np.testing.assert_allclose(split.losses, alone.losses, rtol=1e-5)
  assert len(split.params["head"]["kernel"].sharding.device_set) == 4


def test_recipes_have_the_published_numbers():
  base, huge = finetune.mae("base"), finetune.ijepa()
  assert (base.learning_rate, base.epochs, base.layer_decay) == (2e-3, 100, 0.65)
  assert base.mixing == Mixing(mixup=0.8, cutmix=1.0, prob=1.0, switch_prob=0.5)
  assert (huge.learning_rate, huge.drop_path, huge.weight_decay) == (1e-4, 0.25, 0.04)
  low = finetune.ijepa_low_shot("huge")
  assert (low.learning_rate, low.weight_decay) == (3e-5, 0.4) and low.mixing == Mixing()
  with pytest.raises(ValueError, match="did you mean 'large'"):
    finetune.ijepa_low_shot("Large")


# Mixing


def batch():
  """Images of one grey each, number i + 1, and one-hot targets of class i."""
  images = jnp.ones((4, 8, 8, 1)) * (1.0 + jnp.arange(4))[:, None, None, None]
  return images, jnp.eye(4)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_follow_the_pixels(kind):
  mix = jax.jit(Mixing(**{kind: 1.0}))
  shares = []
  for seed in range(20):
    images, targets = mix(jax.random.key(seed), *batch())
    share = targets[0, 0]
    shares.append(float(share))
    own, other = batch()[0], batch()[0][::-1]
    # Greys are small integers, so means over 64 pixels are exact but for the share's rounding.
    want = share * own.mean((1, 2, 3)) + (1 - share) * other.mean((1, 2, 3))
    np.testing.assert_allclose(images.mean((1, 2, 3)), want, rtol=1e-5)
    np.testing.assert_allclose(targets, share * jnp.eye(4) + (1 - share) * jnp.eye(4)[::-1])
    whole = ((images == own) | (images == other)).all()
    assert whole == (kind == "cutmix")
    if kind == "cutmix":  # one box
      cut = np.asarray(images[0, ..., 0] == 4)
      np.testing.assert_array_equal(cut, cut.any(1)[:, None] & cut.any(0))
      for side in (cut.any(1), cut.any(0)):
        assert np.abs(np.diff(side.astype(int))).sum() <= 2
  assert 0.2 < np.mean(shares) < 0.9 and np.std(shares) > 0.1


def test_probabilities_count():
  unmixed, cut = 0, 0
  mix = jax.jit(Mixing(mixup=1.0, cutmix=1.0, prob=0.5, switch_prob=0.25))
  for seed in range(200):
    images = np.asarray(mix(jax.random.key(seed), *batch())[0])
    same = (images == np.asarray(batch()[0])).all()
    unmixed += same
    cut += not same and set(np.unique(images)) <= {1, 2, 3, 4}
  # Binomial(200, 0.5) and (200, 0.125), 3.5 standard deviations; small boxes may cut nothing.
  assert 75 < unmixed < 130 and 8 < cut < 42
  images, targets = Mixing()(jax.random.key(0), *batch())
  np.testing.assert_array_equal(images, batch()[0])
  np.testing.assert_array_equal(targets, jnp.eye(4))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: Mixing(mixup=-1.0), "mixup and cutmix must be 0 or more"),
    (lambda: Mixing(prob=1.5), r"must lie in \[0, 1\]"),
    (lambda: dataclasses.replace(PLAIN, layer_decay=0.0), r"layer_decay in \(0, 1\]"),
    (lambda: dataclasses.replace(PLAIN, warmup_epochs=2), "warmup_epochs within the epochs"),
    (lambda: dataclasses.replace(PLAIN, label_smoothing=1.0), r"label_smoothing must lie in"),
  ],
)
def test_impossible_settings_say_what_is_wrong(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(
  ("images", "labels", "message"),
  [
    (np.zeros((16, 8, 8, 1), np.uint8), np.zeros(16, int), r"u8\[n 16 16 1\], .*uint8\[16, 8"),
    (np.zeros((16, 16, 16, 1)), np.zeros(16, int), "found float64"),
    (np.zeros((0, 16, 16, 1), np.uint8), np.zeros(0, int), "n at least 1"),
    (np.zeros((8, 16, 16, 1), np.uint8), np.zeros(8, int), "batch_size=16 is more than the 8"),
    (np.zeros((16, 16, 16, 1), np.uint8), np.full(16, 4), r"must lie in 0\.\.3"),
  ],
)
def test_impossible_images_say_what_is_wrong(images, labels, message):
  with pytest.raises(ValueError, match=message):
    finetune.fit(make_encoder(), images, labels, num_classes=4, protocol=PLAIN, seed=0)
