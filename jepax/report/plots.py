"""Charts and pictures as strings that live inside an HTML page and take its colours.

Charts are drawn by matplotlib's object interface (no pyplot, no global state) and leave as inline
SVG whose colours and fonts are CSS variables, so that one page serves light and dark screens.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

THUMBNAIL = 112  # pixels a side above which pictures are shrunk, to keep a page under 2 MB
TARGET_COLOURS = 6  # CSS variables --t0 .. --t5
MAX_POINTS = 400  # of a line; more can't be told apart on a screen


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve: x, y of equal length, and the CSS variable of its colour, '--c0'.

  faint: raw values behind a smoothed curve.
  """

  x: Sequence[float]
  y: Sequence[float]
  colour: str
  faint: bool = False


@dataclasses.dataclass(frozen=True)
class Guide:
  """A dashed horizontal line at y, such as a control's score."""

  y: float
  colour: str


def chart(
  lines: Sequence[Line],
  *,
  name: str,
  label: str,
  guides: Sequence[Guide] = (),
  style: str = "plain",
) -> str:
  """Curves over steps as an inline SVG.

  Args:
    lines: at least one, each with at least one point.
    name: unique on the page; the SVG's internal ids derive from it.
    label: what a screen reader says.
    guides: horizontal reference lines.
    style: of the y axis, 'plain', 'percent' (values are fractions of 1) or 'log'.
  """
  colours = ["--ink", "--muted", "--rule", *(item.colour for item in (*lines, *guides))]
  # matplotlib wants real colours: stand-ins, which become CSS variables in the SVG's text.
  stand_in = {colour: f"#0000{i:02x}" for i, colour in enumerate(dict.fromkeys(colours))}
  figure = Figure(figsize=(4.0, 2.35), layout="constrained")
  axes = figure.subplots()
  for guide in guides:
    axes.axhline(guide.y, color=stand_in[guide.colour], linewidth=1.1, linestyle=(0, (4, 3)))
  for line in lines:
    _draw(axes, line, stand_in[line.colour])
  _dress(axes, stand_in, style)
  svg = _svg(figure, name, label)
  for colour, hexadecimal in stand_in.items():
    svg = svg.replace(hexadecimal, f"var({colour})")
  return svg


def smooth(values: Sequence[float], *, window: int) -> np.ndarray:
  """Moving average over `window` points centred on each, so that it does not lag; fewer at ends."""
  kernel = np.ones(max(1, min(window, len(values))))
  return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _draw(axes, line: Line, colour: str) -> None:
  stride = -(-len(line.x) // MAX_POINTS)
  x, y = list(line.x[::stride]), list(line.y[::stride])
  if x[-1] != line.x[-1]:
    x, y = [*x, line.x[-1]], [*y, line.y[-1]]
  if line.faint:
    axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.3)
    return
  axes.plot(x, y, color=colour, linewidth=1.8, solid_capstyle="round")
  axes.plot(x[-1:], y[-1:], color=colour, marker="o", markersize=4.5)


def _dress(axes, stand_in: dict[str, str], style: str) -> None:
  """Few ticks, light grid, no box: the data is what has ink."""
  if style == "log":
    axes.set_yscale("log")
    axes.minorticks_off()
  else:
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(y=0.08)
  percent = style == "percent"
  axes.yaxis.set_major_formatter(FuncFormatter(_percent if percent else _short))
  axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(_short))
  axes.annotate(
    "step",
    xy=(0, 0),
    xycoords="axes fraction",
    xytext=(-4, -8),
    textcoords="offset points",
    ha="right",
    va="center",
    fontsize=8,
    color=stand_in["--muted"],
  )
  axes.tick_params(length=0, labelsize=8, labelcolor=stand_in["--muted"])
  axes.grid(axis="y", color=stand_in["--rule"], linewidth=0.8)
  axes.set_axisbelow(True)
  for side in ("left", "right", "top"):
    axes.spines[side].set_visible(False)
  axes.spines["bottom"].set_color(stand_in["--muted"])
  axes.spines["bottom"].set_linewidth(0.8)


def _percent(value: float, _position: int) -> str:
  return f"{100 * value:g}%"


def _short(value: float, _position: int) -> str:
  """1500 -> 1.5k, 0.00025 -> 2.5e-4."""
  if value != 0 and abs(value) < 1e-3:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
  for size, suffix in ((1e6, "M"), (1e3, "k")):
    if abs(value) >= size:
      return f"{value / size:g}{suffix}"
  return f"{value:.4g}"


def _svg(figure: Figure, name: str, label: str) -> str:
  """The figure as an <svg> that scales, speaks, shares no id and carries no font."""
  buffer = io.StringIO()
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  text = buffer.getvalue()
  view = re.search(r'viewBox="[^"]*"', text).group()
  body = text[text.index("<defs>") : text.rindex("</svg>")]
  # A <style> inside an inline SVG would apply to the whole page, and so does each group's id.
  body = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.S)
  body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
  body = re.sub(r"\s*\n\s*", " ", body)
  return f'<svg class="chart" role="img" aria-label="{html.escape(label)}" {view}>{body}</svg>'


def scatter(points: np.ndarray, colours: Sequence[str]) -> str:
  """A map of points as the data URI of a transparent PNG, sharp on dense screens.

  Args:
    points: f32[n 2].
    colours: one a point, as '#rrggbb'; they must read on light and on dark ground.
  """
  low, high = points.min(0), points.max(0)
  widest = np.maximum(high - low, 1e-12).max()
  span = 1.05 * widest  # room for the dots at the rim
  middle = (low + high) / 2
  ratio = float(np.clip(((high - low)[1] + 0.05 * widest) / span, 0.55, 1.0))
  figure = Figure(figsize=(5.4, 5.4 * ratio), dpi=200)
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  axes.set_xlim(middle[0] - span / 2, middle[0] + span / 2)
  axes.set_ylim(middle[1] - span * ratio / 2, middle[1] + span * ratio / 2)
  size = float(np.clip(24000 / len(points), 4, 40))
  axes.scatter(points[:, 0], points[:, 1], s=size, c=list(colours), alpha=0.75, linewidths=0)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
  palette = Image.open(buffer).quantize(256, method=Image.Quantize.FASTOCTREE)
  return _png(palette)


def image_uri(image: np.ndarray) -> str:
  """A picture as a data URI: small ones pixel by pixel as PNG, large ones as a JPEG thumbnail.

  Args:
    image: u8[h w c] with c of 1 or 3, or u8[h w].

  Raises:
    ValueError: another shape or dtype.
  """
  if image.ndim == 3 and image.shape[-1] == 1:
    image = image[..., 0]
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
    raise ValueError(
      f"a picture must be u8[h w], u8[h w 1] or u8[h w 3], found {image.dtype}{list(image.shape)}"
    )
  picture = Image.fromarray(image)
  if max(picture.size) <= THUMBNAIL // 2:
    return _png(picture)
  picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  picture.save(buffer, format="JPEG", quality=88)
  return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def sharpness(uri: str) -> str:
  """The class attribute that keeps the pixels of a small picture square; '' for a photograph."""
  return ' class="pixel"' if uri.startswith("data:image/png") else ""


def _png(picture: Image.Image) -> str:
  buffer = io.BytesIO()
  picture.save(buffer, format="PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def context_overlay(uri: str, context: np.ndarray) -> str:
  """The picture with every patch that the encoder does not see covered.

  Args:
    uri: of the picture.
    context: bool[h w], the patches it sees.
  """
  veil = f'<path class="veil" d="{_cells(~context)}"/>'
  return _overlay(uri, context.shape, veil, "context")


def target_overlay(uri: str, targets: np.ndarray) -> str:
  """The picture with each target block outlined in a colour of its own, the rest dimmed.

  Args:
    uri: of the picture.
    targets: bool[m h w].
  """
  parts = [f'<path class="veil half" d="{_cells(~targets.any(0))}"/>']
  for i, block in enumerate(targets):
    colour = f'style="--c:var(--t{i % TARGET_COLOURS})"'
    parts.append(f'<path class="block" {colour} d="{_cells(block)}"/>')
    parts.append(f'<path class="edge" {colour} d="{_edges(block)}"/>')
  return _overlay(uri, targets.shape[1:], "".join(parts), "targets")


def _overlay(uri: str, grid: tuple[int, ...], body: str, label: str) -> str:
  rows, columns = grid
  size = f'{sharpness(uri)} width="{columns}" height="{rows}"'
  return (
    f'<svg class="patches" role="img" aria-label="{label}" viewBox="0 0 {columns} {rows}">'
    f'<image{size} href="{uri}" preserveAspectRatio="none"/>{body}</svg>'
  )


def _cells(mask: np.ndarray) -> str:
  """Unit squares of a bool[h w] as one path, runs in a row joined."""
  out = []
  for y, row in enumerate(mask):
    edges = np.flatnonzero(np.diff(np.pad(row.astype(np.int8), 1)))
    out += [f"M{a} {y}H{b}V{y + 1}H{a}z" for a, b in edges.reshape(-1, 2)]
  return "".join(out)


def _edges(mask: np.ndarray) -> str:
  """The border between inside and outside of a bool[h w], as one path of unit strokes."""
  padded = np.pad(mask.astype(np.int8), 1)
  ys, xs = np.nonzero(np.diff(padded, axis=0)[:, 1:-1])
  out = [f"M{x} {y}h1" for y, x in zip(ys, xs, strict=True)]
  ys, xs = np.nonzero(np.diff(padded, axis=1)[1:-1])
  return "".join(out + [f"M{x} {y}v1" for y, x in zip(ys, xs, strict=True)])
