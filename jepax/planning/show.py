"""A plan as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from jepax.planning.plan import Plan


def text(plan: Plan, *, config: str) -> str:
  """The plan for people; `config` names what was planned."""
  target, chip = plan.target, plan.target.chip
  mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
  slices = f"{target.slices} x " if target.slices > 1 else ""
  rows = [
    ("target", f"{slices}{target.topology}: {target.chips:,} {chip.name}, mesh {mesh}"),
    ("batch", f"{plan.batch_size:,} images, {plan.batch_size / len(target.devices):g} a device"),
    *_size(plan),
    *_memory(plan),
    *_collectives(plan),
    *_verdict(plan),
    *_cost(plan),
  ]
  lines = [f"{name:18}{value}".rstrip() for name, value in rows]
  return "\n".join([config, *lines])


def _amount(value: float, unit: str = "") -> str:
  """1.5e9 -> '1.50 G'."""
  for prefix in ("", "k", "M", "G", "T", "P"):
    if abs(value) < 1000 or prefix == "P":
      break
    value /= 1000
  return f"{value:.2f} {prefix}{unit}".rstrip()


def _bytes(count: float) -> str:
  """'12.76 GiB', smaller ones in MiB."""
  return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _size(plan: Plan) -> list[tuple[str, str]]:
  parts = ", ".join(f"{name} {_amount(count)}" for name, count in plan.parameters.items())
  step = plan.flops_per_image * plan.batch_size
  return [
    ("parameters", f"{_amount(sum(plan.parameters.values()))}: {parts}"),
    (
      "model FLOPs",
      f"{_amount(plan.flops_per_image, 'FLOP')} an image, {_amount(step, 'FLOP')} a step "
      "(matrix products, forward and backward, none made again)",
    ),
  ]


def _memory(plan: Plan) -> list[tuple[str, str]]:
  memory = plan.program.memory
  if memory is None:
    return []
  rows = [("memory a device", f"{_bytes(memory.needed)} needed")]
  for name in ("arguments", "outputs", "aliased", "temporaries", "code", "peak"):
    rows.append((f"  {name}", _bytes(getattr(memory, name))))
  return rows


def _collectives(plan: Plan) -> list[tuple[str, str]]:
  if plan.program.collectives is None:
    return []
  rows = [
    (f"  {kind}", f"{traffic.count:,} a step, {_bytes(traffic.bytes)}")
    for kind, traffic in plan.program.collectives.items()
  ]
  rows.insert(0, ("collectives", "results on one device" if rows else "none"))
  if plan.program.rematerialised:
    count = len(plan.program.rematerialised)
    rows.append(("  WARNING", f"{count} x involuntary full rematerialization"))
    rows += [("", line) for line in plan.program.rematerialised]
  return rows


def _verdict(plan: Plan) -> list[tuple[str, str]]:
  if plan.capacity is None:
    return [("fits", "unknown: this machine's memory is no chip's")]
  verdict = "yes" if plan.fits else "NO, it does not fit"
  needed, capacity = plan.program.needed, plan.capacity
  rows = [
    ("fits", f"{verdict}: needs {_bytes(needed)} of {_bytes(capacity)} ({needed / capacity:.0%})"),
  ]
  if plan.largest is None:
    return rows
  if plan.largest.fits == 0:
    return [*rows, ("largest batch", f"none: {plan.largest.fails:,} does not fit; raise mesh.fsdp")]
  limit = "all images" if plan.largest.fails is None else f"{plan.largest.fails:,} does not fit"
  return [*rows, ("largest batch", f"{plan.largest.fits:,} on this mesh ({limit})")]


def _cost(plan: Plan) -> list[tuple[str, str]]:
  epochs = plan.steps * plan.batch_size / plan.examples
  run = f"{plan.steps:,} steps, {epochs:.4g} epochs of {plan.examples:,} images"
  if plan.chip_hours is None:
    return [("run", run)]
  peak = plan.target.chip.peak / 1e12
  hours = plan.chip_hours / plan.target.chips
  return [
    ("run", run),
    (
      "cost",
      f"{plan.chip_hours:,.1f} chip-hours, {hours:,.2f} h on all chips, ASSUMING an MFU of "
      f"{plan.mfu:.0%} of {peak:g} TFLOP/s a chip (dense bfloat16; {plan.target.chip.source})",
    ),
  ]


def as_json(plan: Plan, *, config: str) -> dict[str, Any]:
  """The same as numbers: bytes, FLOPs, hours."""
  target, program = plan.target, plan.program
  return {
    "config": config,
    "topology": target.topology,
    "slices": target.slices,
    "chip": dataclasses.asdict(target.chip),
    "chips": target.chips,
    "devices": len(target.devices),
    "mesh": plan.mesh,
    "batch_size": plan.batch_size,
    "parameters": {"all": sum(plan.parameters.values()), **plan.parameters},
    "flops_per_image": plan.flops_per_image,
    "flops_per_step": plan.flops_per_image * plan.batch_size,
    "memory": program.memory and dataclasses.asdict(program.memory),
    "needed": program.needed,
    "capacity": plan.capacity,
    "fits": plan.fits,
    "largest": plan.largest and dataclasses.asdict(plan.largest),
    "collectives": program.collectives
    and {kind: dataclasses.asdict(traffic) for kind, traffic in program.collectives.items()},
    "rematerialised": list(program.rematerialised),
    "compile_seconds": program.seconds,
    "examples": plan.examples,
    "steps": plan.steps,
    "mfu_assumed": plan.mfu,
    "chip_hours": plan.chip_hours,
  }
