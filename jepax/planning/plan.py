"""From a config and a machine to a plan: what the run needs, whether it fits, what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from jepax import flops, sharding
from jepax.data.build import Data
from jepax.experiment import Experiment, prepare
from jepax.planning import aot, search
from jepax.planning.targets import Target

# Training images of sets that need not be there to plan for them.
TRAINING_IMAGES = {
  "cifar10": 50_000,
  "cifar100": 50_000,
  "fashion_mnist": 60_000,
  "imagenet2012": 1_281_167,
  "mnist": 60_000,
}
EMBEDDED_IMAGES = 10_000


@dataclasses.dataclass(frozen=True)
class Largest:
  """fits: the largest batch found to fit, 0 for none. fails: the smallest found not to, None where
  `fits` is limited by the number of images. needed: bytes on each device, of every batch tried.
  """

  fits: int
  fails: int | None
  needed: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run of a config on a target needs.

  mesh: axis -> devices. parameters: part of the model -> how many are trained. flops_per_image: of
  matrix products, forward and backward, without what rematerialisation computes again. steps, mfu:
  of the whole run, and the share of the chips' peak it is assumed to reach. capacity: bytes of a
  device. largest: None where it was not searched for.
  """

  target: Target
  batch_size: int
  mesh: dict[str, int]
  parameters: dict[str, int]
  flops_per_image: float
  steps: int
  examples: int
  mfu: float
  program: aot.Program
  largest: Largest | None

  @property
  def capacity(self) -> float | None:
    """What the compiler said, else what the table of chips says."""
    shortage = self.program.shortage
    return shortage[1] if shortage else self.target.chip.memory

  @property
  def fits(self) -> bool | None:
    """None where the machine's memory is not known."""
    if self.capacity is None:
      return None
    return self.program.shortage is None and self.program.needed <= self.capacity

  @property
  def chip_hours(self) -> float | None:
    """Of the whole run; None where the chip's peak is not known."""
    if self.target.chip.peak is None:
      return None
    operations = self.flops_per_image * self.batch_size * self.steps
    return operations / (self.mfu * self.target.chip.peak) / 3600


def examples_of(config: ConfigDict, given: int | None) -> int:
  """The number of training images, without reading any.

  Raises:
    ValueError: it is neither known nor given.
  """
  data = config.data
  if given is not None:
    return given
  whole = data.train_split == "train"
  if data.source == "embedded" and whole:
    return EMBEDDED_IMAGES
  if data.source == "tfds" and whole and data.name in TRAINING_IMAGES:
    return TRAINING_IMAGES[data.name]
  named = {k: data[k] for k in ("source", "name", "path", "train_split") if data[k]}
  raise ValueError(
    f"how many training images {named} has is not known here, and a plan reads no data: give "
    "--examples=N"
  )


def make(
  config: ConfigDict,
  target: Target,
  *,
  examples: int | None = None,
  mfu: float = 0.4,
  find_largest: bool = True,
) -> Plan:
  """Compiles the run's training step for the target and counts what it costs.

  Args:
    config: from `jepax.config.load`. Its data are never read.
    target: from `jepax.planning.targets.find`.
    examples: training images; None for those of a set that is known.
    mfu: share of the chips' peak that training is assumed to reach, in (0, 1].
    find_largest: also search for the largest batch that fits, at the cost of further compiles.

  Raises:
    ValueError: a config or mesh that can't work, or an unknown number of images.
  """
  if not 0 < mfu <= 1:
    raise ValueError(f"--mfu={mfu} must lie in (0, 1]")
  examples = examples_of(config, examples)
  experiment = describe(config, target, examples=examples)
  program = aot.compile_step(experiment)
  plan = Plan(
    target=target,
    batch_size=config.batch_size,
    mesh=dict(experiment.mesh.shape),
    parameters=_parameters(experiment.abstract_state.params),
    flops_per_image=step_flops(config, target, examples) / config.batch_size,
    steps=experiment.steps,
    examples=examples,
    mfu=mfu,
    program=program,
    largest=None,
  )
  if plan.capacity is None or not find_largest:
    return plan
  return dataclasses.replace(plan, largest=_largest(plan, config, experiment))


def describe(config: ConfigDict, target: Target, *, examples: int) -> Experiment:
  """The run on the target's devices, with as many images as it will have and none of them."""
  data = Data.unread(config.data, count=examples)
  sizes = {axis: config.mesh[axis] for axis in sharding.AXES}
  mesh = sharding.make_mesh(**sizes, devices=list(target.devices))
  return prepare(config, data=data, mesh=mesh)


def step_flops(config: ConfigDict, target: Target, examples: int) -> int:
  """Of one step's matrix products."""
  plain = describe(without_remat(config), target, examples=examples)
  return flops.count(aot.trace(plain).jaxpr)


def without_remat(config: ConfigDict) -> ConfigDict:
  """The same run, which computes nothing again: that is no work of the model's."""
  plain = ConfigDict(config.to_dict())
  _replace(plain.method, remat="none")
  return plain.lock()


def _replace(section: ConfigDict, **values: Any) -> None:
  """Sets these keys wherever a section has them."""
  for key, value in section.items():
    if isinstance(value, ConfigDict):
      _replace(value, **values)
    elif key in values:
      section[key] = values[key]


def _parameters(params: Mapping[str, Any]) -> dict[str, int]:
  return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}


def _largest(plan: Plan, config: ConfigDict, experiment: Experiment) -> Largest:
  def sized(batch: int) -> Experiment:
    changed = ConfigDict(config.to_dict())
    changed.batch_size = batch
    return describe(changed.lock(), plan.target, examples=plan.examples)

  needed = search.largest(
    lambda batch: aot.compile_step(sized(batch)).needed,
    capacity=plan.capacity,
    known={config.batch_size: plan.program.needed},
    base=aot.state_bytes(experiment),
    unit=_unit(experiment, sized),
    most=plan.examples,
  )
  fits, fails = search.bracket(needed, capacity=plan.capacity)
  return Largest(fits, fails, needed)


def _unit(experiment: Experiment, sized: Callable[[int], Experiment]) -> int:
  """What batches are multiples of: the rows' devices times micro-batches times a power of two.

  Methods may ask for more than the mesh does, as I-JEPA's groups of 128 contexts of one length;
  only they know, and say so when a run with so many rows more is prepared.
  """
  batch = experiment.config.batch_size
  rows_a_device = experiment.batch_sharding.shard_shape((batch,))[0]
  unit = batch // rows_a_device * experiment.config.accumulate
  while unit < batch:
    try:
      sized(batch + unit)
    except ValueError:
      unit *= 2
    else:
      return unit
  return batch
