"""The report's curves: loss and schedules, probes, collapse numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jepax.report import plots
from jepax.report.parts import key, name_of, section

CONTROLS = ("start", "random_init", "pixels")
COLOURS = {
  "target": "--c0",
  "online": "--c1",
  "random_init": "--c2",
  "pixels": "--c3",
  "start": "--c5",
  "other": "--c4",
}
NOT_PROBES = ("collapse", "train", "predictor")
SCHEDULES = {
  "schedule/learning_rate": "Learning rate",
  "schedule/weight_decay": "Weight decay",
  "schedule/momentum": "Target momentum",
}
LOSSES = {"train/loss": ("training", "--c0"), "eval/loss": ("held-out", "--c5")}
COLLAPSE = {
  "feature_std": ("Feature std", "0 is complete collapse"),
  "cosine": ("Mean pairwise cosine", "1 is complete collapse"),
  "rankme": ("RankMe", "effective dimensions"),
  "rankme_centred": ("RankMe, centred", "effective dimensions of the differences"),
  "ema_distance": ("Target's distance", "from the online weights, of their norm"),
}

History = Sequence[Mapping[str, Any]]


def colour_of(encoder: str) -> str:
  """The CSS variable of an encoder's colour, the same in every chart."""
  return COLOURS[encoder if encoder in COLOURS else "other"]


def probes_in(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """The probes among the results, {'knn': {'target': 0.8}}, without those that are empty."""
  return {
    probe: dict(scores)
    for probe, scores in results.items()
    if probe not in NOT_PROBES
    and isinstance(scores, Mapping)
    and scores
    and all(isinstance(score, int | float) for score in scores.values())
  }


def series(history: History, name: str) -> tuple[list[float], list[float]]:
  """Steps and values of one metric, where it was measured and finite."""
  points = [(row["step"], row[name]) for row in history if name in row]
  points = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
  return [x for x, _ in points], [y for _, y in points]


def training(history: History) -> str:
  """The loss and the schedules."""
  figures, keys = [], []
  curves = _losses(history)
  if curves:
    figures.append(_figure("Loss", "", _loss_chart(curves)))
    keys = [key(*LOSSES[name]) for name in curves]
  for name, title in SCHEDULES.items():
    steps, values = series(history, name)
    if steps:
      lines = [plots.Line(steps, values, "--c0")]
      figures.append(_figure(title, "", plots.chart(lines, name=name, label=title)))
  return _charts_section(
    "Training",
    [
      "The loss of each batch is faint, its moving average strong. The held-out loss is of the "
      "probes' images, with the same masks and views every time.",
      "When the targets come from an encoder that itself moves, the loss may rise while the "
      "features improve: judge a run by the probes.",
    ],
    figures,
    keys if len(keys) > 1 else (),
  )


def _losses(history: History) -> dict[str, tuple[list[float], list[float]]]:
  """The curves of LOSSES, from training's first on: before it a loss would flatten all others."""
  first, _ = series(history, "train/loss")
  rows = [row for row in history if not first or row["step"] >= first[0]]
  curves = {name: series(rows, name) for name in LOSSES}
  return {name: curve for name, curve in curves.items() if curve[0]}


def _loss_chart(curves: Mapping[str, tuple[list[float], list[float]]]) -> str:
  """The losses of `LOSSES` that were measured; those of single batches smoothed."""
  values = [value for _, losses in curves.values() for value in losses]
  spread = max(values) / min(values) if min(values) > 0 else 1
  lines = []
  for name, (steps, losses) in curves.items():
    colour = LOSSES[name][1]
    if name == "train/loss" and len(steps) > 20:
      lines.append(plots.Line(steps, losses, colour, faint=True))
      losses = list(plots.smooth(losses, window=max(5, len(steps) // 40)))
    lines.append(plots.Line(steps, losses, colour))
  label = " and ".join(LOSSES[name][0] for name in curves) + " loss over steps"
  return plots.chart(lines, name="loss", label=label, style="log" if spread > 30 else "plain")


def probes_over_time(history: History, probes: Mapping[str, Mapping[str, float]]) -> str:
  """Each probe's accuracy during training, with its controls as dashed lines."""
  figures, lines_of, guides_of = [], {}, {}
  for probe in probes:
    lines = _curves(history, f"{probe}/")
    guides = _controls(history, probe)
    if not lines:
      continue
    lines_of |= dict.fromkeys(lines)
    guides_of |= dict.fromkeys(guides)
    drawing = plots.chart(
      [plots.Line(*xy, colour_of(encoder)) for encoder, xy in lines.items()],
      name=f"probe-{probe}",
      label=f"{probe} accuracy over steps",
      guides=[plots.Guide(y, colour_of(encoder)) for encoder, y in guides.items()],
      style="percent",
    )
    figures.append(_figure(name_of(probe), "accuracy", drawing))
  keys = [key(name_of(e), colour_of(e)) for e in lines_of]
  keys += [key(name_of(e), colour_of(e), "dashed") for e in guides_of]
  return _charts_section(
    "Probes over time",
    [
      "Measured on held-out images while training. Dashed lines are the controls.",
      "During training a smaller bank of labelled features may be used than at the end, so the "
      "last point and the table above can differ.",
    ],
    figures,
    keys,
  )


def _curves(history: History, prefix: str, suffix: str = "") -> dict[str, tuple[list, list]]:
  """{encoder: (steps, values)} of the metrics PREFIX encoder SUFFIX; controls have no curve."""
  encoders = dict.fromkeys(
    name[len(prefix) : len(name) - len(suffix)]
    for row in history
    for name in row
    if name.startswith(prefix) and name.endswith(suffix)
  )
  found = {e: series(history, f"{prefix}{e}{suffix}") for e in encoders if e not in CONTROLS}
  return {encoder: curve for encoder, curve in found.items() if curve[0]}


def _controls(history: History, probe: str) -> dict[str, float]:
  """Controls measured during training; the final ones had another bank and would mislead."""
  measured = {control: series(history, f"{probe}/{control}")[1] for control in CONTROLS}
  return {control: values[-1] for control, values in measured.items() if values}


def collapse(history: History, results: Mapping[str, Any]) -> str:
  """Collapse numbers at the end as a table, and over time as curves."""
  figures, seen = [], {}
  for number, (title, note) in COLLAPSE.items():
    lines = _curves(history, "collapse/", f"_{number}")
    if lines:
      seen |= dict.fromkeys(lines)
      drawing = plots.chart(
        [plots.Line(*xy, colour_of(encoder)) for encoder, xy in lines.items()],
        name=f"collapse-{number}",
        label=f"{title} over steps",
      )
      figures.append(_figure(title, note, drawing))
  keys = [key(name_of(e), colour_of(e)) for e in seen]
  return _charts_section(
    "Collapse monitors",
    [
      "A joint-embedding loss can be driven to zero by features that say nothing.",
      "Std and cosine see complete collapse: all images alike. RankMe, the effective number of "
      "dimensions, sees features that fill only a few. Compare with random initialisation: an "
      "untrained network already maps all images into a narrow cone.",
    ],
    figures,
    keys,
    table=_collapse_table(results["collapse"]) if "collapse" in results else "",
  )


def _collapse_table(final: Mapping[str, Mapping[str, float]]) -> str:
  numbers = [n for n in COLLAPSE if any(n in found for found in final.values())]
  if not numbers:
    return ""
  heads = "".join(f"<th>{html.escape(COLLAPSE[n][0])}</th>" for n in numbers)
  rows = []
  for encoder, found in final.items():
    cells = "".join(f"<td>{_value(found, n)}</td>" for n in numbers)
    rows.append(f"<tr><td>{name_of(encoder)}</td>{cells}</tr>")
  return (
    f'<div class="scroll"><table><thead><tr><th>at the end</th>{heads}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
  )


def _value(found: Mapping[str, float], number: str) -> str:
  if number not in found:
    return ""
  if not number.startswith("rankme"):
    return f"{found[number]:.4f}"
  width = f" <small>of {found['dim']}</small>" if "dim" in found else ""
  return f"{found[number]:.1f}{width}"


def _figure(title: str, note: str, drawing: str) -> str:
  small = f" <small>{html.escape(note)}</small>" if note else ""
  return f"<figure><figcaption>{title}{small}</figcaption>{drawing}</figure>"


def _charts_section(
  title: str,
  aside: Sequence[str],
  figures: Sequence[str],
  keys: Sequence[str] = (),
  *,
  table: str = "",
) -> str:
  if not figures and not table:
    return ""
  body = table
  if figures:
    legend = f'<div class="keys">{"".join(keys)}</div>' if keys else ""
    body += f'{legend}<div class="charts">{"".join(figures)}</div>'
  return section(title, aside, body)
