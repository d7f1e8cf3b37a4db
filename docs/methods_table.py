"""The table of methods in docs/which-method.md, read off the methods that the recipes build.

python docs/methods_table.py [--write]
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable

from jepax import config as config_lib
from jepax.data.augment import Augment
from jepax.data.build import Data
from jepax.experiment import Experiment, prepare

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "which-method.md"
START, END = "<!-- python docs/methods_table.py -->\n", "<!-- end -->"
# Each method's recipe for ImageNet.
RECIPES = {
  "I-JEPA": "ijepa_vith14",
  "MAE": "mae_imagenet",
  "data2vec 2.0": "data2vec2_vitb",
  "DINOv2": "dinov2_vitl",
  "Barlow Twins": "barlow_twins_imagenet",
  "VICReg": "vicreg_imagenet",
  "SimCLR": "simclr_imagenet",
  "MoCo v3": "moco_v3_imagenet",
  "BYOL": "byol_imagenet",
  "SimSiam": "simsiam_imagenet",
  "LeJEPA": "lejepa_imagenet",
}
HEADS = ("method", "modality", "learns from", "augmentation", "momentum encoder", "the loss mixes")
HEADS = (*HEADS, "batch", "encoder")
# What each field of `Augment` that is on does to a view.
CHANGES = {
  "flip": "flip",
  "brightness": "colour",
  "contrast": "colour",
  "saturation": "colour",
  "hue": "colour",
  "grey": "grey",
  "blur": "blur",
  "solarise": "solarise",
}


def built(recipe: str) -> Experiment:
  """A recipe at full size, for images that nobody reads."""
  config = config_lib.load(str(ROOT / "configs" / f"{recipe}.py"))
  return prepare(config, data=Data.unread(config.data, count=1_281_167))


def augmentations(experiment: Experiment) -> str:
  """'crop, flip, ...' of any view, on the host or on the device."""
  views = experiment.method.views
  crops: tuple[Augment, ...] = views.crops if hasattr(views, "crops") else (views,)
  cropped = experiment.config.data.crop_scale != (1.0, 1.0)
  cropped |= any(crop.crop_scale != (1.0, 1.0) for crop in crops)
  found = [change for field, change in CHANGES.items() if any(getattr(c, field) for c in crops)]
  return ", ".join(dict.fromkeys(["crop"] * cropped + found)) or "none"


def row(name: str, experiment: Experiment) -> tuple[str, ...]:
  """The cells of a method."""
  method, c = experiment.method, experiment.config
  masked = "hidden patches" if hasattr(method, "masks") else ""
  views = f"{len(method.views.crops)} views" if hasattr(method.views, "crops") else ""
  return (
    f"[{name}](methods/{c.method.name}.md)",
    "images",
    ", ".join(filter(None, (masked, views))),
    augmentations(experiment),
    "yes" if "target" in method.branches else "no",
    method.couples_batch or "nothing",
    str(c.batch_size),
    f"{c.method.encoder.variant}",
  )


def table(build: Callable[[str], Experiment] = built) -> str:
  """Markdown, a row a method; `build` gives a recipe's experiment."""
  rows = [HEADS, ("---",) * len(HEADS)]
  rows += [row(name, build(recipe)) for name, recipe in RECIPES.items()]
  return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
  if not parser.parse_args().write:
    print(table())
    return
  before, _, rest = PAGE.read_text().partition(START)
  PAGE.write_text(before + START + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
  main()
