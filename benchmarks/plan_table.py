"""Plans every shipped config for a fitting TPU topology: benchmarks/results/plan.md and plan.json.

  python benchmarks/plan_table.py [--only=NAME,NAME] [--out=benchmarks/results]

Needs pip install 'jepax[tpu]', no TPU and no network. One compile a config and a few more for the
largest batch: two hours on two cores, ResNets the longest. With --only the other rows stay as
they are.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
DEFAULT = "v5e:2x2"
TOPOLOGIES = {
  "ijepa_vitti": "v5e:4x4",
  "ijepa_vits": "v5e:4x4",
  "ijepa_vitb": "v5e:4x4",
  "ijepa_vitl": "v5e:8x8",
  "ijepa_vith14": "v5e:16x16",
  "ijepa_vith16_448": "v5e:16x16",
  "ijepa_vitg16": "v5p:8x8x8",
  "mae_imagenet": "v5e:8x8",
  "dinov2_vitl": "v5e:16x16",
  "data2vec2_vitb": "v5e:4x4",
  "lejepa_imagenet": "v5e:8x8",
  "moco_v3_imagenet": "v5e:8x8",
  "byol_imagenet": "v5e:4x4",
  "simclr_imagenet": "v5e:4x4",
  "vicreg_imagenet": "v5e:4x4",
}
# Sets that are not known without their data: ImageNet-22k, a folder of one's own, Imagenette.
EXAMPLES = {"ijepa_vitg16": 14_197_122, "photos": 10_000, "imagenette_resnet18": 9_469}
HEADER = (
  "config",
  "chips",
  "batch",
  "parameters",
  "GFLOP / image",
  "memory / device",
  "largest batch",
  "collectives a step",
  "chip-hours",
)


def names() -> list[str]:
  """Those of all shipped configs."""
  return sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


def plan(name: str) -> dict:
  """What `python -m jepax.plan --json` says of a config."""
  command = [sys.executable, "-m", "jepax.plan", f"--config=configs/{name}.py", "--json"]
  command.append(f"--topology={TOPOLOGIES.get(name, DEFAULT)}")
  if name in EXAMPLES:
    command.append(f"--examples={EXAMPLES[name]}")
  return json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def row(name: str, found: dict) -> list[str]:
  """The cells of a config."""
  gib = 2**30
  traffic = [
    f"{kind} {seen['count']} ({seen['bytes'] / gib:.2f} GiB)"
    for kind, seen in (found["collectives"] or {}).items()
  ]
  largest = found["largest"]
  return [
    name,
    f"{found['topology']} ({found['chips']})",
    f"{found['batch_size']:,}",
    f"{found['parameters']['all'] / 1e6:,.1f} M",
    f"{found['flops_per_image'] / 1e9:,.2f}",
    f"{found['needed'] / gib:.2f} of {found['capacity'] / gib:.2f} GiB"
    + ("" if found["fits"] else ": **does not fit**"),
    f"{largest['fits']:,}" + ("" if largest["fails"] else " (all images)"),
    "; ".join(traffic) or "none",
    f"{found['chip_hours']:,.2f}",
  ]


def table(rows: dict[str, dict], *, command: str) -> str:
  """The results as Markdown."""
  versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "libtpu", "flax"))
  mfu = {found["mfu_assumed"] for found in rows.values()}
  lines = [
    "# Every shipped config, planned",
    "",
    f"`{command}`, {datetime.date.today()}, {versions}, optimization level O0. Compiled ahead of",
    "time for chips that are described, not run on. Each config on its own mesh, by default",
    "data parallel over all devices. Chip-hours are of the whole run and ASSUME an MFU of "
    + " and ".join(f"{x:.0%}" for x in sorted(mfu))
    + ".",
    "FLOPs are those of matrix products, forward and backward, without recomputation. The largest",
    "batch is known to 10 % or to the next multiple of the devices; near the limit the compiler",
    "saves memory by its own rules, and a batch may fit though a smaller one does not.",
    "",
    "| " + " | ".join(HEADER) + " |",
    "|" + "---|" * len(HEADER),
    *("| " + " | ".join(row(name, rows[name])) + " |" for name in sorted(rows)),
    "",
  ]
  if missing := sorted(set(names()) - set(rows)):
    lines += [f"Not planned yet: {', '.join(missing)}.", ""]
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="names of configs, by commas")
  parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
  arguments = parser.parse_args()
  stored = arguments.out / "plan.json"
  rows = json.loads(stored.read_text()) if arguments.only and stored.exists() else {}
  failed = []
  for name in arguments.only.split(",") if arguments.only else names():
    try:
      rows[name] = plan(name)
    except subprocess.CalledProcessError:  # it has said why; the others are still wanted
      failed.append(name)
      continue
    print(" | ".join(row(name, rows[name])), flush=True)
    stored.write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.out / "plan.md").write_text(table(rows, command="python benchmarks/plan_table.py"))
  if failed:
    raise SystemExit(f"no plan of {', '.join(failed)}; with --only they can be done again")


if __name__ == "__main__":
  main()
