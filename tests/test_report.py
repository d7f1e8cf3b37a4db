"""The report: whole, self-contained, well-formed, and honest about what a run lacks."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jepax import report
from jepax.report import plots

VOID = {"meta", "img", "br"}
HEADINGS = (
  "Accuracy beside its controls",
  "Training",
  "Probes over time",
  "Collapse monitors",
  "Masks on real images",
  "Reconstructions",
  "What the predictor knows",
  "Nearest neighbours",
  "Map of the embedding",
  "What patches have in common",
  "Where it looks",
  "All numbers",
  "How to reproduce",
)


class Balance(HTMLParser):
  """Collects text and headings, and fails on a tag closed out of order."""

  def __init__(self):
    super().__init__()
    self.open, self.headings, self.text = [], [], []

  def handle_starttag(self, tag, attrs):
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

  def handle_data(self, data):
    self.text.append(data)
    if self.open and self.open[-1] == "h2":
      self.headings.append(data)


def parse(page):
  parser = Balance()
  parser.feed(page)
  parser.close()
  assert parser.open == []
  return parser


def history(steps=120):
  rows = []
  for step in range(1, steps + 1):
    row = {"step": step, "time": 0.0, "train/loss": 1 / step, "schedule/learning_rate": 1e-3}
    row |= {"schedule/weight_decay": 0.04, "schedule/momentum": 0.996}
    if step % 40 == 0:
      row |= {"knn/target": step / 200, "linear/target": step / 190, "knn/online": step / 210}
      row |= {"collapse/target_feature_std": 0.4, "collapse/target_rankme_centred": 9.0}
    rows.append(row)
  return rows


def pictures(*, size=28, channels=1, count=3):
  rng = np.random.default_rng(0)

  def images(*lead):
    return rng.integers(0, 256, size=(*lead, size, size, channels), dtype=np.uint8)

  targets = np.zeros((count, 2, 4, 6), bool)
  targets[:, 0, :2, :3] = True
  targets[:, 1, 1:3, 2:5] = True
  return report.Pictures(
    images=images(count),
    context=~targets.any(1).reshape(count, -1),
    targets=targets.reshape(count, 2, -1),
    grid=(4, 6),
    reconstruction_images=images(count),
    is_masked=targets.any(1),
    reconstruction=images(count),
    neighbour_queries=images(count),
    neighbours=images(count, 5),
    neighbour_labels=rng.random((count, 5)) < 0.5,
    embedding=rng.normal(size=(200, 2)).astype(np.float32),
    labels=np.arange(200) % 3,
    class_names=["shoe", "<bag>", "hat"],
    pca_images=images(count),
    pca=rng.integers(0, 256, size=(count, 4, 6, 3), dtype=np.uint8),
    attention_images=images(count),
    attention=rng.random((count, 3, 4, 6)),
  )


def full(**changes):
  fields = {
    "title": "I-JEPA on <data> & more",
    "command": "python -m jepax.main --config=a.py && echo <done>",
    "config_text": '{"lr": 0.001, "note": "</pre><script>"}',
    "environment": {"jax": "0.10.2", "platform": "Linux x86_64"},
    "results": {
      "knn": {"target": 0.8034, "online": 0.79, "random_init": 0.5525, "pixels": 0.81},
      "linear": {"target": 0.85, "random_init": 0.69, "pixels": 0.82},
      "collapse": {"target": {"feature_std": 0.44, "rankme": 41.25, "cosine": 0.5, "dim": 192}},
      "protocols": {
        "knn": {
          "source": "a <source>",
          "settings": {"k": 20},
          "scores": {
            "target": {"accuracy": {"mean": 0.8034, "std": 0.0042, "seeds": [0.8, 0.81]}},
            "pixels": {"rankme": {"mean": 12.3456, "std": 0.0, "seeds": [12.3456]}},
          },
        }
      },
      "predictor": {"place": 0.905, "place_chance": 0.25, "image": 0.123, "image_chance": 0.01},
      "alarms": [],
      "train": {"steps": 2000, "seconds": 271.3, "images_per_second": 1887.2},
    },
    "history": history(),
    "alarms": [],
    "pictures": pictures(),
  }
  return report.Report(**(fields | changes))


def test_the_whole_page(tmp_path):
  path = tmp_path / "report.html"
  report.write(path, full())
  page = path.read_text(encoding="utf-8")
  parsed = parse(page)
  assert tuple(parsed.headings) == HEADINGS
  text = "".join(parsed.text)
  for shown in ("80.3%", "+25.1", "+16.0", "4 min 31 s", "41.2 of 192", "no alarm", "<bag>"):
    assert shown in text, shown
  assert page.count('class="chart"') == 8  # loss, 3 schedules, 2 probes, 2 collapse numbers
  assert len(page.encode()) < 2_000_000
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_page_loads_nothing_and_runs_nothing():
  page = report.render(full())
  assert re.findall(r'(?:src|href)="(?!data:image/|#)', page) == []
  assert re.findall(r"url\((?!#)", page) == []
  assert "@import" not in page
  assert "<script" not in page
  assert "<link" not in page


def test_ids_are_unique_and_every_reference_resolves():
  page = report.render(full())
  ids = re.findall(r'\bid="([^"]+)"', page)
  assert len(ids) == len(set(ids))
  used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page))
  assert {a or b for a, b in used} <= set(ids)


def test_charts_take_the_colours_of_the_page():
  chart = plots.chart([plots.Line([0, 1], [0, 1], "--c1")], name="a", label='"x"')
  assert "var(--c1)" in chart
  assert "var(--muted)" in chart
  assert re.findall(r"#0000[0-9a-f]{2}", chart) == []  # a stand-in left behind


def test_text_is_escaped():
  page = report.render(full(alarms=["<b>std</b>"], environment={"<i>": "<u>"}))
  for raw in ("<data>", "<done>", "</pre><script>", "<bag>", "<b>std</b>", "<i>", "<u>"):
    assert raw not in page, raw
  assert "I-JEPA on &lt;data&gt; &amp; more" in page


def test_alarms_stand_out():
  page = report.render(full(alarms=["target encoder: complete collapse"]))
  assert 'role="alert"' in page
  assert "1 alarm" in page
  assert "no alarm" not in page


def test_missing_pieces_leave_no_section():
  empty = report.Report(title="t", command="", config_text="", environment={}, results={})
  assert parse(report.render(empty)).headings == []

  bare = full(history=[], pictures=report.Pictures(), results={"train": {"steps": 3}})
  assert parse(report.render(bare)).headings == ["How to reproduce"]

  unlabelled = full(results={"collapse": {"target": {"feature_std": 0.4}}}, history=[])
  headings = parse(report.render(unlabelled)).headings
  assert headings[0] == "Collapse monitors"
  assert "Accuracy beside its controls" not in headings


@pytest.mark.parametrize(
  "field",
  ["images", "targets", "grid", "reconstruction", "neighbours", "embedding", "pca", "attention"],
)
def test_each_picture_is_optional(field):
  partial = vars(pictures()) | {field: None}
  headings = parse(report.render(full(pictures=report.Pictures(**partial)))).headings
  assert len(headings) == len(HEADINGS) - 1


def test_values_that_are_missing_or_not_finite_are_left_out():
  rows = [
    {"step": 1, "train/loss": math.nan},
    {"step": 2, "train/loss": None},
    {"step": 3, "train/loss": 0.5, "knn/target": 0.4},
    {"step": 4},
  ]
  page = report.render(full(history=rows))
  charts = re.findall(r"<figure>.*?</figure>", page, flags=re.S)
  assert len(charts) == 2
  assert all("nan" not in chart.lower() for chart in charts)


def test_the_held_out_loss_stands_beside_that_of_training():
  rows = [{"step": 0, "eval/loss": 1e6}]
  rows += [{"step": s, "train/loss": 1 / s, "eval/loss": 2 / s} for s in (1, 2, 3)]
  page = report.render(full(history=rows))
  (chart,) = re.findall(r"<figure>.*?</figure>", page, flags=re.S)
  assert "var(--c0)" in chart and "var(--c5)" in chart
  assert "1M" not in chart  # the loss before training, which would flatten the curves
  assert ">training</span>" in page and ">held-out</span>" in page
  alone = report.render(full(history=[{"step": 1, "train/loss": 1.0}]))
  assert ">held-out</span>" not in alone


def test_controls_measured_during_training_are_guides():
  rows = [{"step": s, "knn/target": 0.1 * s, "knn/random_init": 0.33} for s in (1, 2, 3)]
  charts = re.findall(r"<figure>.*?</figure>", report.render(full(history=rows)), flags=re.S)
  assert len(charts) == 1
  assert "stroke-dasharray" in charts[0]
  assert "var(--c2)" in charts[0]


def test_photographs_keep_the_page_small():
  photos = pictures(size=224, channels=3, count=8)
  assert len(report.render(full(pictures=photos)).encode()) < 2_000_000


def test_many_classes_get_colours_without_a_legend():
  labels = np.arange(200) % 100
  many = report.Pictures(embedding=pictures().embedding, labels=labels)
  page = report.render(full(pictures=many))
  assert "Map of the embedding" in page
  assert page.split("Map of the embedding")[1].count('class="key dot"') == 0


def test_a_failed_report_leaves_the_old_one(tmp_path):
  path = tmp_path / "report.html"
  path.write_text("old")
  broken = report.Pictures(**(vars(pictures()) | {"grid": (4, 4)}))
  with pytest.raises(ValueError, match="must cover 16 patches"):
    report.write(path, full(pictures=broken))
  assert path.read_text() == "old"
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def decode(uri):
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (14, 28, 3)])
def test_small_pictures_survive_pixel_by_pixel(shape):
  image = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
  uri = plots.image_uri(image)
  assert uri.startswith("data:image/png")
  np.testing.assert_array_equal(decode(uri), image.squeeze())


def test_large_pictures_become_thumbnails():
  uri = plots.image_uri(np.full((300, 600, 3), 77, np.uint8))
  assert decode(uri).shape == (56, 112, 3)
  with pytest.raises(ValueError, match="found float32"):
    plots.image_uri(np.zeros((4, 4, 3), np.float32))


def test_overlays_cover_what_the_masks_say():
  mask = np.array([[1, 1, 0], [0, 1, 0]], bool)
  hidden = re.search(r'class="veil" d="([^"]*)"', plots.context_overlay("data:", mask)).group(1)
  assert hidden == "M2 0H3V1H2zM0 1H1V2H0zM2 1H3V2H2z"
  edge = re.search(r'class="edge"[^>]* d="([^"]*)"', plots.target_overlay("data:", mask[None]))
  # The border of this piece of three cells has eight unit sides.
  sides = {"M0 0h1", "M1 0h1", "M0 1h1", "M1 2h1", "M0 0v1", "M1 1v1", "M2 0v1", "M2 1v1"}
  assert set(re.findall(r"M\d \d[hv]1", edge.group(1))) == sides


def test_smooth_does_not_lag_or_bend_a_line():
  line = np.arange(50.0)
  np.testing.assert_allclose(plots.smooth(line, window=7)[3:-3], line[3:-3])  # exact but rounding
  np.testing.assert_allclose(plots.smooth(np.ones(9), window=4), 1)


def test_protocol_numbers_have_their_spread_and_settings():
  text = " ".join(parse(report.render(full())).text)
  assert "80.3% ±0.4" in text, "a share, over two seeds"
  assert "12.35" in text and "12.35 ±" not in text, "another number, of one seed"
  assert "k=20. Source: a <source>" in text
  assert "90.5%" in text and "12.3%" in text, "what the predictor finds"
