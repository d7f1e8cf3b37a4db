"""Configs: files, overrides, durations, construction, and what every mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest
import tiny
from flax import linen as nn
from ml_collections import ConfigDict

from jepax import config as config_lib
from jepax.config import Run, base, build_method, check_keys, duration, flatten, load
from jepax.construct import construct
from jepax.models.vit import ViT, vit
from jepax.names import nearest, one_of

FILE = '''
"""A config with a value of every type."""
from jepax.config import base, parse_arg


def get_config(arg=""):
  arg = parse_arg(arg, smoke=False, patch=4, lr=1e-3, kind="a")
  c = base()
  c.optim.lr = arg.lr
  c.total = "2 steps" if arg.smoke else "9 steps"
  c.method = dict(
    name="ijepa", encoder=dict(patch=arg.patch, width=None), momentum=(0.99, 1.0), sizes=[1, 2]
  )
  return c
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("configs") / "recipe.py"
  path.write_text(FILE)
  return str(path)


# --- loading --------------------------------------------------------------------------------


def test_load_hands_the_argument_on_and_locks(file):
  assert load(file).total == "9 steps"
  config = load(f"{file}:smoke,patch=7")
  assert config.total == "2 steps" and config.method.encoder.patch == 7
  with pytest.raises(AttributeError):
    config.optim.unheard = 1


@pytest.mark.parametrize(
  "argument, expected",
  [
    ("", {}),
    ("smoke", {"smoke": True}),
    ("smoke=false", {}),
    ("smoke=True,patch=8,lr=1,kind=7", {"smoke": True, "patch": 8, "lr": 1.0, "kind": "7"}),
  ],
)
def test_parse_arg(argument, expected):
  defaults = dict(smoke=False, patch=4, lr=1e-3, kind="a")
  parsed = config_lib.parse_arg(argument, **defaults).to_dict()
  assert parsed == {**defaults, **expected}
  assert {k: type(v) for k, v in parsed.items()} == {k: type(v) for k, v in defaults.items()}


@pytest.mark.parametrize(
  "argument, message",
  [
    ("smoek", "'smoek' is unknown; did you mean 'smoke'.*allowed: .*patch"),
    ("patch", "'patch' has no value; write patch=4"),
    ("patch=big", ":patch: found 'big', expected int such as 4"),
    ("smoke=1", ":smoke: found '1', expected bool such as False"),
  ],
)
def test_parse_arg_errors(argument, message):
  with pytest.raises(ValueError, match=message):
    config_lib.parse_arg(argument, smoke=False, patch=4)


@pytest.mark.parametrize(
  "name, text, message",
  [
    ("recpie.py", None, "'recpie.py' is no config file.*did you mean 'recipe.py'"),
    ("recipe.txt", "hello", "'recipe.txt' is no config file.*did you mean 'recipe.py'"),
    ("empty.py", "x = 1", r"empty.py defines no get_config\(arg=''\)"),
    ("number.py", "get_config = 5", r"number.py defines no get_config\(arg=''\)"),
    ("syntax.py", "x = (", r"^config file syntax.py: SyntaxError: .*\(syntax.py, line 1\)"),
    (
      "missing.py",
      "\nimport nosuch",
      "^config file missing.py, line 2: ModuleNotFoundError: .*nosuch",
    ),
    ("none.py", "def get_config(arg): pass", "must return a ConfigDict.* it returned NoneType"),
    ("noarg.py", "def get_config(): pass", "noarg.py: TypeError: get_config.. takes 0"),
    (
      "typo.py",
      "from jepax.config import base\ndef get_config(arg):\n  base().optm.lr = 1",
      "typo.py, line 3: AttributeError: .*Did you mean .optim.",
    ),
  ],
)
def test_load_errors_of_files(file, monkeypatch, name, text, message):
  folder = Path(file).parent
  monkeypatch.chdir(folder)
  if text is not None:
    (folder / name).write_text(text)
  with pytest.raises(ValueError, match=message):
    load(name)


def test_check_keys():
  check_keys(base())
  config = base()
  config.method = dict(name="whatever", anything=1)
  check_keys(config)  # the method's own build checks these
  config.optim.larning_rate = 1.0
  with pytest.raises(ValueError, match=r"'optim.larning_rate' is unknown; did you mean 'optim"):
    check_keys(config)
  for section, key, value, message in (
    ("optim", "lr", float("nan"), "optim.lr: found nan, expected finite numbers"),
    ("optim", "lr", "high", "optim.lr: found 'high', expected float"),
    ("data", "mean", ("a",), "data.mean: .* expected tuple"),
    ("data", "std", (float("inf"),), "data.std: .* expected finite"),
    ("data", "path", 5, "data.path: found 5, expected str | None"),
  ):
    config = base()
    with config.ignore_type():
      config[section][key] = value
    with pytest.raises(ValueError, match=message):
      check_keys(config)
  config = base()
  with config.ignore_type():
    config.total, config.mesh = 4, 1  # a bare number is a duration
  with pytest.raises(ValueError, match="mesh=1 must be a section"):
    check_keys(config)
  config = base()
  del config.mesh.fsdp
  with pytest.raises(ValueError, match=r"'mesh.fsdp' is missing; start from jepax.config.base\(\)"):
    check_keys(config)


# --- overrides ------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "override, expected",
  [
    ("batch_size=64", 64),
    ("batch_size=1e3", 1000),
    ("optim.lr=1", 1.0),
    ("optim.lr=2.5e-4", 2.5e-4),
    ("log.tensorboard=false", False),
    ("log.tensorboard=True", True),
    ("log.wandb=12", "12"),  # a string stays one
    ("log.wandb=", ""),
    ("log.wandb=a=b", "a=b"),
    ("total=30 epochs", "30 epochs"),
    ("total=500", "500"),
    ("method.momentum=(0.1,0.2)", (0.1, 0.2)),
    ("method.momentum=[0.1,0.2]", (0.1, 0.2)),
    ("method.momentum=0.1,0.2", (0.1, 0.2)),
    ("method.sizes=(3,)", [3]),
    ("method.encoder.patch=7", 7),
    ("method.encoder.width=7", 7),  # was None, which gives way to anything
    ("method.encoder.width=none", None),
    ("method.encoder.activation=gelu_tanh", "gelu_tanh"),  # new: the build will judge
    ("method.encoder.scan=true", True),
    ("method.encoder.remat=none", "none"),  # the name of a choice
    ("method.objective=mse", "mse"),
    ("data.name=fashion_mnist", "fashion_mnist"),  # a placeholder for a string
    ("data.name=None", None),
  ],
)
def test_override(file, override, expected):
  key = override.partition("=")[0]
  found = flatten(load(file, [override]).to_dict())[key]
  assert found == expected and type(found) is type(expected)


def test_a_section_that_the_recipe_leaves_out_can_be_given():
  quickstart = Path(__file__).parent.parent / "configs" / "quickstart.py"
  given = ["method.regulariser.name=vicreg", "method.regulariser.weight=0.01"]
  found = load(quickstart, given).method.regulariser
  assert found.to_dict() == {"name": "vicreg", "weight": 0.01}
  with pytest.raises(ValueError, match=r"--config.method.regularizer is unknown; did you mean"):
    load(quickstart, ["method.regularizer.name=vicreg"])


def test_another_choice_by_name_drops_what_the_recipe_set_for_the_old_one():
  quickstart = Path(__file__).parent.parent / "configs" / "quickstart.py"
  given = ["method.masks.ratio=0.75", "method.masks.name=random"]  # in any order
  assert load(quickstart, given).method.masks.to_dict() == {"name": "random", "ratio": 0.75}
  recipe = load(quickstart).method.masks.to_dict()
  same = load(quickstart, ["method.masks.name=multiblock"]).method.masks.to_dict()
  assert same == {"name": "multiblock", **recipe}
  # What the caller gives stays, for the build to refuse, as does what no choice takes.
  kept = load(quickstart, ["method.masks.targets=3", "method.masks.ratoi=1", *given]).method
  assert kept.masks.to_dict() == {"name": "random", "ratio": 0.75, "targets": 3, "ratoi": 1}
  assert load(quickstart, ["method.masks.name=randm"]).method.masks.to_dict() == {
    "name": "randm",
    **recipe,
  }


def test_another_regulariser_keeps_what_both_take():
  recipe = Path(__file__).parent.parent / "configs" / "cjepa_fashion_mnist.py"
  found = load(recipe, ["method.regulariser.name=sigreg"]).method.regulariser
  assert found.to_dict() == {"name": "sigreg", "weight": 0.001, "on": "tokens"}


def test_later_overrides_win(file):
  assert load(file, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
  "override, message",
  [
    ("batch_sise=64", "--config.batch_sise is unknown; did you mean 'batch_size'"),
    ("optm.lr=1", "--config.optm is unknown; did you mean 'optim.lr'"),
    ("lr=1", "--config.lr is unknown; did you mean 'optim.lr'"),  # right name, wrong section
    ("seed.lr=1", "--config.seed is unknown"),
    ("zzzzzz=1", r"--config.zzzzzz is unknown; keys of the config: \['accumulate'"),
    ("optim.momentum=0.9", r"--config.optim.momentum is unknown.*; keys of optim: \[.*'b1'"),
    ("method.encodr.patch=4", "--config.method.encodr is unknown; did you mean 'method.encoder.p"),
    ("seed", "--config.seed has no value; write --config.seed=VALUE"),
    ("optim=adamw", "--config.optim is a section; its keys: .*'lr'"),
    ("batch_size=big", "--config.batch_size: found 'big', expected int such as 128"),
    ("batch_size=1.5", "--config.batch_size: found '1.5', expected int"),
    ("batch_size=True", "--config.batch_size: found 'True', expected int"),
    ("optim.lr=fast", "--config.optim.lr: found 'fast', expected float such as 0.001"),
    ("optim.lr=True", "expected float"),
    ("optim.lr=none", "expected float"),
    ("log.tensorboard=1", "found '1', expected bool such as True"),
    ("method.momentum=0.9", r"found '0.9', expected tuple such as \(0.99, 1.0\)"),
  ],
)
def test_override_errors(file, override, message):
  with pytest.raises(ValueError, match=message):
    load(file, [override])


def test_typed_placeholder_refuses_another_type(tmp_path):
  path = tmp_path / "typed.py"
  path.write_text(
    "from ml_collections import config_dict\nfrom jepax.config import base\n"
    "def get_config(arg=''):\n"
    "  c = base()\n  c.method.depth = config_dict.placeholder(int)\n  return c\n"
  )
  assert load(str(path), ["method.depth=3"]).method.depth == 3
  with pytest.raises(ValueError, match=r"--config.method.depth: found 'deep', expected int$"):
    load(str(path), ["method.depth=deep"])


# --- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "value, steps",
  [
    ("100 steps", 100),
    ("1 step", 1),
    ("7", 7),
    (7, 7),
    (0, 0),
    ("0%", 0),
    ("3 epochs", 30),
    ("1 epoch", 10),
    ("1.26 epochs", 13),  # 12.6
    ("0.01 epochs", 1),  # at least one unless zero
    ("640 examples", 40),
    ("1e3 examples", 62),  # 62.5, to even
    ("1e3  examples ", 62),
    ("10%", 20),
    ("0.1 %", 1),
    ("12.4%", 25),  # 24.8
  ],
)
def test_duration(value, steps):
  found = duration(value, where="total", steps_per_epoch=10, batch_size=16, total=200)
  assert found == steps and type(found) is int


@pytest.mark.parametrize(
  "value", ["10 parsecs", "ten steps", "-1 steps", -1, "", "inf steps", "nan", "3epochs", "% 5"]
)
def test_bad_duration(value):
  with pytest.raises(ValueError, match=r"eval.every=.* is no duration; write one like .*'10%'"):
    duration(value, where="eval.every", steps_per_epoch=10, batch_size=16, total=200)


def test_percent_needs_a_total():
  with pytest.raises(ValueError, match="total='5%' is no duration") as error:
    duration("5%", where="total", steps_per_epoch=10, batch_size=16)
  assert "10%" not in str(error.value) and "'10 epochs'" in str(error.value)


def test_positive():
  config = base()
  config_lib.positive(config, "batch_size", "optim.lr")
  config.optim.lr = 0.0
  with pytest.raises(ValueError, match=r"optim.lr=0.0 must be positive"):
    config_lib.positive(config, "batch_size", "optim.lr")


def test_names():
  assert one_of("lars", ("adamw", "lars"), where="optim.name") == "lars"
  with pytest.raises(ValueError, match=r"optim.name='adam' is unknown; did you mean 'adamw'") as e:
    one_of("adam", ("adamw", "lars"), where="optim.name")
  assert "allowed: ['adamw', 'lars']" in str(e.value)
  assert nearest("lr", ["optim.lr", "data.size"]) == "; did you mean 'optim.lr'?"
  assert nearest("qqqq", ["optim.lr"]) == "" and nearest("lr", []) == ""


def test_flatten():
  nested = {"a": {"b": 1, "c": {"d": (2, 3)}}, "e": {}, "f": None}
  assert flatten(nested) == {"a.b": 1, "a.c.d": (2, 3), "e": {}, "f": None}


@pytest.mark.parametrize("patch", [0, 5, 56])
def test_grid_refuses_a_patch_that_does_not_divide(patch):
  run = Run(size=28, channels=1, mean=(0.5,), std=(0.5,), steps=1)
  assert run.grid(7) == (4, 4) and run.grid(28) == (1, 1)
  with pytest.raises(ValueError, match=rf"patch={patch} does not divide data.size=28.*\[2, 4, 7"):
    run.grid(patch)


# --- building -------------------------------------------------------------------------------


def scaled(x: int, *, factor: float = 2.0, run: str = "") -> tuple:
  if factor < 0:
    raise ValueError("factor must not be negative")
  return x, factor, run


def test_construct():
  assert construct(scaled, {"x": 3}, where="m", run="r") == (3, 2.0, "r")
  section = ConfigDict({"x": 3, "factor": 0.5})
  assert construct(scaled, section, where="m", run="r") == (3, 0.5, "r")


@pytest.mark.parametrize(
  "arguments, message",
  [
    ({"x": 1, "factr": 2}, r"m.factr is unknown; did you mean 'factor'\?; allowed: \['x', 'fact"),
    ({}, r"m lacks \['x'\]; set --config.m.x="),
    ({"x": 1, "run": "mine"}, "m.run is decided by the run and can't be set; remove it"),
    ({"x": 1, "factor": -1.0}, "m: factor must not be negative"),
    ({"x": 1, "factor": "high"}, "m.factor: found 'high', expected float"),
    (5, r"m=5 must be a section, such as m=dict\("),
  ],
)
def test_construct_errors(arguments, message):
  with pytest.raises(ValueError, match=message):
    construct(scaled, arguments, where="m", run="r")


def test_construct_knows_the_fields_behind_a_factory():
  made = construct(
    vit, {"variant": "tiny", "patch": 4, "depth": 2}, where="method.encoder", dtype=jnp.bfloat16
  )
  assert isinstance(made, ViT) and made.depth == 2 and made.dtype == jnp.bfloat16
  for arguments, message in (
    ({"variant": "tiny", "patch": 4, "dpth": 2}, "method.encoder.dpth is unknown.*'depth'"),
    ({"variant": "tiny"}, r"method.encoder lacks \['patch'\]"),
    ({"variant": "tiny", "patch": 4, "name": "x"}, "method.encoder.name is unknown"),  # flax's own
    ({"variant": "huhe", "patch": 4}, "method.encoder: variant='huhe'.*did you mean 'huge'"),
    ({"variant": "tiny", "patch": 4, "heads": 5}, "width=192 does not divide into heads=5"),
    ({"variant": "tiny", "patch": 4, "activation": "gleu"}, "did you mean 'gelu'"),
  ):
    with pytest.raises(ValueError, match=message):
      construct(vit, arguments, where="method.encoder", dtype=jnp.float32)


RUN = Run(size=tiny.SIZE, channels=1, mean=(0.5,), std=(0.5,), steps=10)


@pytest.mark.parametrize("name", sorted(tiny.METHODS))
def test_build_method(name):
  method = build_method({"name": name, **tiny.METHODS[name]}, RUN)
  assert type(method).__module__.startswith("jepax.methods.")
  assert isinstance(method.encoder, nn.Module)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"name": "ijepaa"}, "^method.name='ijepaa' is unknown; did you mean 'ijepa'.*'mae'"),
    ({"name": None}, "^method.name='None' is unknown"),
    ({"momentm": (0.9, 1.0)}, "^method.momentm is unknown; did you mean 'momentum'"),
    ({"run": 1}, "^method.run is decided by the run"),
    ({"objective": "huber"}, "^method: objective='huber' is unknown"),
    ({"encoder": dict(tiny.ENCODER, dpth=1)}, "^method.encoder.dpth is unknown"),
    ({"encoder": dict(tiny.ENCODER, patch=5)}, "^method.encoder.patch=5 does not divide"),
    ({"predictor": dict(width=15, depth=1)}, "^method.predictor: width=15 does not divide"),
    ({"predictor": dict(width=18, depth=1)}, "^method.predictor: width=18: .*multiple of 4"),
    ({"encoder": dict(tiny.ENCODER, width=18)}, "^method.encoder: width=18: .*multiple of 4"),
    ({"encoder": dict(tiny.ENCODER, registers=2)}, "^method.encoder.registers is decided by"),
    ({"encoder": dict(tiny.ENCODER, drop_path=0.1)}, "^method.encoder.drop_path is decided by"),
    ({"predictor": dict(width=16, depth=1, drop_path=0.1)}, "predictor.drop_path is decided by"),
    (
      {"encoder": dict(tiny.ENCODER, scan="yes")},
      "^method.encoder.scan: found 'yes', expected bool",
    ),
    ({"masks": dict(targets=2.5)}, "^method.masks.targets: found 2.5, expected int$"),
    ({"masks": dict(target_scale=(0.1,))}, r"^method.masks.target_scale: .*tuple\[float, float\]"),
    ({"masks": dict(target_aspect=(1.0, 1e9))}, "^method.masks: target_aspect must be a range"),
    ({"views": dict(flip=True)}, "^method.views.flip: found True, expected float"),
    ({"views": dict(crop_scale=(0.5, float("inf")))}, "expected finite numbers"),
    ({"momentum": (0.9, 1.5)}, "^method.momentum=.*<= 1"),
    ({"momentum": ("a", "b")}, "^method.momentum: found .*expected tuple"),
    ({"masks": dict(target_scale=(2.0, 3.0))}, "^method.masks: target_scale must be a range"),
  ],
)
def test_build_method_errors(changes, message):
  section = {"name": "ijepa", **tiny.METHODS["ijepa"], **changes}
  with pytest.raises(ValueError, match=message):
    build_method(section, RUN)


def test_methods_are_the_files_that_build():
  assert {"ijepa", "mae", "vicreg"} <= set(config_lib.methods())
  assert "jepa" not in config_lib.methods()  # the general form, not a recipe


@pytest.mark.parametrize("expander", [(), (8,), (-4, 4), (4.5, 4)])
def test_an_expander_needs_widths(expander):
  section = {"name": "vicreg", **tiny.METHODS["vicreg"], "expander": expander}
  with pytest.raises(ValueError, match=r"^method.expander"):
    build_method(section, RUN)
