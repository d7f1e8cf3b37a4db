"""python -m jepax.convert SOURCE OUT [--to=hf] [--branch=NAME] [--positions=HOW] [--size=448]"""

from __future__ import annotations

from absl import app, flags, logging

from jepax import cli

TO = flags.DEFINE_enum(
  "to", "jepax", ["jepax", "hf"], "What OUT is: a jepax or Hugging Face folder."
)
BRANCH = flags.DEFINE_string(
  "branch", None, "The only set of weights to write, such as 'target'; --to=hf writes one anyway."
)
POSITIONS = flags.DEFINE_enum(
  "positions", None, ["interpolate", "recompute"], "How positions come to another grid of patches."
)
SIZE = flags.DEFINE_integer("size", None, "Pixels a side of the images; the source's by default.")
HEADS = flags.DEFINE_integer(
  "heads", None, "Attention heads of a Meta checkpoint of unusual width."
)
DROP = flags.DEFINE_list("drop", [], "Beginnings of tensor names to leave out: classifier.,pooler.")


def parse(argv: list[str]) -> list[str]:
  """absl's flags; what is left must be the source and the folder to write."""
  left = cli.known(argv)
  if len(left) != 3:
    cli.fail(f"expected SOURCE and OUT, found {left[1:]}; usage: {__doc__}")
  return left


def main(argv: list[str]) -> None:
  """Reads, changes the size, writes, and says what was written."""
  from jepax.convert import source  # JAX loads here, after the flags were found good

  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.ERROR)
  with cli.errors(ValueError, OSError):
    weights = source.read(argv[1], heads=HEADS.value, drop=DROP.value)
    weights = weights.at(size=SIZE.value, positions=POSITIONS.value)
    source.write(weights, argv[2], to=TO.value, branch=BRANCH.value)
  written = [BRANCH.value] if BRANCH.value else list(weights.branches)
  kept = written[:1] if TO.value == "hf" else [*written, *([] if BRANCH.value else weights.parts)]
  print(f"{argv[2]}: {', '.join(kept)} of {weights.origin['format']} {weights.origin['path']}")


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
