"""A run as one HTML page: what it reached, how it got there, and how to get there again.

The page is a single file that loads nothing and runs no script, so it can be mailed, archived and
opened in ten years. What a run lacks (labels, masks, a probe) is left out with its section.
"""

from __future__ import annotations

import dataclasses
import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jepax.report import charts, pictures, protocols
from jepax.report.parts import Pictures, key, name_of, section
from jepax.report.style import CSS

__all__ = ["Pictures", "Report", "write"]


@dataclasses.dataclass(frozen=True)
class Report:
  """What the page is made of.

  title: what was trained on what.
  command: the line that reproduces the run. config_text: its resolved config.
  environment: versions and hardware, shown as they are.
  results: the content of results.json. 'collapse' holds {encoder: {number: value}}, 'train' the
    facts of training, and every other dict of fractions of 1 is a probe: {'knn': {'target': ..,
    'online': .., 'random_init': .., 'pixels': ..}}.
  history: the rows of metrics.jsonl, sparse: 'step', 'train/loss', 'eval/loss', 'schedule/NAME',
    'PROBE/ENCODER' such as 'knn/target', and 'collapse/ENCODER_NUMBER'.
  alarms: what collapsed, in words; empty when nothing did.
  """

  title: str
  command: str
  config_text: str
  environment: Mapping[str, str]
  results: Mapping[str, Any]
  history: Sequence[Mapping[str, Any]] = ()
  alarms: Sequence[str] = ()
  pictures: Pictures = dataclasses.field(default_factory=Pictures)


def write(path: str | os.PathLike, report: Report) -> None:
  """Writes the page, whole or not at all.

  Args:
    path: of the HTML file; its folder exists.
    report: what to show.

  Raises:
    ValueError: pictures whose shapes do not fit each other.
  """
  path = Path(path)
  text = render(report)
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_text(text, encoding="utf-8")
  os.replace(temporary, path)


def render(report: Report) -> str:
  """The page as text."""
  probes = charts.probes_in(report.results)
  sections = (
    _accuracy(probes),
    charts.training(report.history),
    charts.probes_over_time(report.history, probes),
    charts.collapse(report.history, report.results),
    pictures.masks(report.pictures),
    pictures.reconstructions(report.pictures),
    protocols.predictor(report.results),
    pictures.neighbours(report.pictures),
    pictures.embedding(report.pictures),
    pictures.patch_colours(report.pictures),
    pictures.attention(report.pictures),
    protocols.table(report.results),
    _reproduce(report),
  )
  title = html.escape(report.title)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{title}</title><style>{CSS}</style></head>\n<body>\n"
    f'<header><div class="kicker">jepax run report</div><h1>{title}</h1>'
    f"{_lede(probes)}{_alarms(report.alarms)}{_tiles(report, probes)}</header>\n"
    f"<main>{''.join(sections)}</main>\n"
    "<footer>Written by jepax. This page is one file: it loads nothing and runs no script."
    "</footer>\n</body></html>\n"
  )


def _lede(probes: Mapping[str, Mapping[str, float]]) -> str:
  """The result in one sentence."""
  if not probes:
    return ""
  probe, scores = next(iter(probes.items()))
  first = next(iter(scores))
  text = (
    f"Without a label in training, the frozen <b>{name_of(first)}</b> encoder reaches "
    f"<b>{scores[first]:.1%}</b> in the {name_of(probe)} test on held-out images"
  )
  beside = [
    f"{scores[control]:.1%} {words}"
    for control, words in (
      ("start", "for the weights it started from"),
      ("random_init", "for the same network at random initialisation"),
      ("pixels", "for raw pixels"),
    )
    if control in scores and control != first
  ]
  last = f" and {beside.pop()}" if len(beside) > 1 else ""
  return f'<p class="lede">{text}{", against " + ", ".join(beside) if beside else ""}{last}.</p>'


def _alarms(alarms: Sequence[str]) -> str:
  return "".join(
    f'<p class="alarm" role="alert"><b>Alarm.</b> {html.escape(alarm)}</p>' for alarm in alarms
  )


def _tiles(report: Report, probes: Mapping[str, Mapping[str, float]]) -> str:
  tiles = []
  for probe, scores in list(probes.items())[:2]:
    first = next(iter(scores))
    gain = _gain(scores)
    note = f"{gain} points over random init" if gain else ""
    tiles.append((f"{name_of(probe)}, {name_of(first)}", f"{scores[first]:.1%}", note))
  if "collapse" in report.results:
    seen = len(report.alarms)
    value = '<span class="down">alarm</span>' if seen else '<span class="up">none</span>'
    tiles.append(("Collapse", value, f"{seen} alarm{'s' * (seen > 1)}" if seen else "no alarm"))
  train = _facts(report)
  if "seconds" in train:
    speed = "images_per_second"
    note = f"{_number(train[speed])} images a second" if speed in train else ""
    tiles.append(("Training time", _duration(train["seconds"]), note))
  cells = (
    f'<div class="tile"><div class="name">{name}</div><div class="value">{value}</div>'
    f'<div class="note">{note}</div></div>'
    for name, value, note in tiles
  )
  return f'<div class="tiles">{"".join(cells)}</div>' if tiles else ""


def _gain(scores: Mapping[str, float]) -> str:
  first = next(iter(scores))
  if "random_init" not in scores or first == "random_init":
    return ""
  points = 100 * (scores[first] - scores["random_init"])
  direction = "up" if points > 0 else "down"
  return f'<span class="{direction}">{points:+.1f}</span>'


def _accuracy(probes: Mapping[str, Mapping[str, float]]) -> str:
  """Each probe beside its controls: a table, and the same as dots on a scale."""
  if not probes:
    return ""
  encoders = list(dict.fromkeys(encoder for scores in probes.values() for encoder in scores))
  heads = "".join(f"<th>{name_of(encoder)}</th>" for encoder in encoders)
  gained = any(_gain(scores) for scores in probes.values())
  heads += "<th>gain over random, points</th>" * gained
  rows, strips = [], []
  for probe, scores in probes.items():
    best = max(scores.values())
    cells = "".join(_score(scores, encoder, best) for encoder in encoders)
    gain = f"<td>{_gain(scores)}</td>" * gained
    rows.append(f"<tr><td>{name_of(probe)}</td>{cells}{gain}</tr>")
    dots = "".join(
      f'<i style="left:{100 * score:.2f}%;--c:var({charts.colour_of(encoder)})" '
      f'title="{name_of(encoder)} {score:.1%}"></i>'
      for encoder, score in reversed(scores.items())
    )
    strips.append(f'<div>{name_of(probe)}</div><div class="track">{dots}</div>')
  ticks = "".join(f'<span style="left:{tick}%">{tick}%</span>' for tick in range(0, 101, 25))
  keys = "".join(key(name_of(e), charts.colour_of(e), "dot") for e in encoders)
  body = (
    f'<div class="scroll"><table><thead><tr><th>accuracy</th>{heads}</tr></thead>'
    f"<tbody>{''.join(rows)}</tbody></table></div>"
    f'<div class="strip">{"".join(strips)}<div></div><div class="track scale">{ticks}</div></div>'
    f'<div class="keys">{keys}</div>'
  )
  return section(
    "Accuracy beside its controls",
    [
      "Share of held-out images labelled right from frozen features.",
      "A probe means little alone: the same network at random initialisation shows what the "
      "architecture gives for nothing, raw pixels what the data gives.",
    ],
    body,
  )


def _score(scores: Mapping[str, float], encoder: str, best: float) -> str:
  if encoder not in scores:
    return "<td></td>"
  score = scores[encoder]
  return f'<td class="best">{score:.1%}</td>' if score == best else f"<td>{score:.1%}</td>"


def _reproduce(report: Report) -> str:
  parts = []
  if report.command:
    parts.append(f"<pre>{html.escape(report.command)}</pre>")
  if report.config_text:
    config = html.escape(report.config_text)
    parts.append(f"<details><summary>Resolved config</summary><pre>{config}</pre></details>")
  facts = {name.replace("_", " "): _number(value) for name, value in _facts(report).items()}
  for title, table in (("Training", facts), ("Environment", report.environment)):
    if table:
      rows = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in table.items()
      )
      parts.append(f"<div><h3>{title}</h3><dl>{rows}</dl></div>")
  aside = "The command, the config it resolved to, and the machine it ran on."
  return section("How to reproduce", [aside], "".join(parts)) if parts else ""


def _facts(report: Report) -> Mapping[str, Any]:
  return report.results["train"] if "train" in report.results else {}  # noqa: SIM401


def _number(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if not math.isfinite(value):
    return str(value)
  return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {rest} s" if minutes else f"{rest} s"
