"""python -m jepax.plan --config=FILE[:ARG] --topology=v5e:16x16 [--config.KEY=VALUE ...] [--json]

Compiles the run's training step for chips that need not be there, offline, and prints what it
needs: parameters, FLOPs, memory, collectives, the largest batch that fits, chip-hours.
"""

from __future__ import annotations

import functools
import json
import os

from absl import app, flags, logging

from jepax import cli

CONFIG = flags.DEFINE_string(
  "config", None, "Config file: configs/ijepa_vith14.py. Its data are not read.", required=True
)
TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "TPU chips (v4:2x2x1, v5e:16x16, v5p:8x8x8, v6e:4x4, tpu7x:4x4x4), h100:HOSTSxGPUS or cpu:N.",
  required=True,
)
SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that topology.")
EXAMPLES = flags.DEFINE_integer("examples", None, "Training images, where the set is not known.", 1)
MFU = flags.DEFINE_float("mfu", 0.4, "Share of the chips' peak assumed for the cost.")
LARGEST = flags.DEFINE_bool("largest", True, "Search for the largest batch that fits.")
JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(argv: list[str]) -> None:
  """Plans the run and prints it."""
  from jepax.planning import environment

  for name, value in environment.variables(TOPOLOGY.value).items():
    os.environ[name] = value
  # JAX loads here, once it can't look for hardware any more.
  from jepax import config as config_lib
  from jepax.planning import aot, plan, show, targets

  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  with cli.errors(ValueError):
    config = config_lib.load(CONFIG.value, [a.removeprefix("config.") for a in argv[1:]])
    with aot.stderr():  # libtpu complains that this is no TPU
      target = targets.find(TOPOLOGY.value, slices=SLICES.value)
    found = plan.make(
      config, target, examples=EXAMPLES.value, mfu=MFU.value, find_largest=LARGEST.value
    )
  if JSON.value:
    print(json.dumps(show.as_json(found, config=CONFIG.value), indent=2))
  else:
    print(show.text(found, config=CONFIG.value))


if __name__ == "__main__":
  app.run(main, flags_parser=functools.partial(cli.parse, prefix="--config."))
