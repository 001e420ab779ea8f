import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from infra.config import TrackingConfig, UserError
from infra.tracking import Run
from models.config import SamplerConfig
from pipelines.config import EvaluateConfig, ReportConfig
from pipelines.evaluate import evaluate
from pipelines.figures import SIZE, Line, data_uri, enlarge, histogram, line_chart, png, sheet, strip
from pipelines.report import report
from tests.pipelines import ring

SECTIONS = ("glance", "actions", "control", "meaning", "tokens", "data", "training", "lineage")


class Page(HTMLParser):
    """What a browser would load, and the text of every section; fails on tags that don't match."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.loads, self.sections, self.open, self.tags = [], {}, [], set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        facts = dict(attributes)
        self.loads += [facts[name] for name in ("src", "href", "xlink:href", "srcset", "action") if name in facts]
        if tag not in self.VOID:
            self.open.append((tag, facts.get("id")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, key in self.open:
            if tag == "section":
                self.sections[key] = self.sections.get(key, "") + data


@pytest.fixture(scope="module")
def made(tmp_path_factory, empty_store):
    """A home with a dataset, a trained world with curves in tracking, its evaluation and the report of it."""
    from infra.config import Home

    home = Home(tmp_path_factory.mktemp("home")).ensure()
    shutil.copy(empty_store, home.path / "mlflow.db")
    reference = ring.dataset(home, test=3)
    world = ring.publish_world(home, tmp_path_factory.mktemp("world"), ring.trained(), reference)
    run = Run(TrackingConfig(), home, name="ring", key=world.identity, folder=home.runs / "ring")
    for step in range(3):
        run.metrics(step, {"loss": 2.0 - step})
    run.close()
    sampler = SamplerConfig(steps=2)
    evaluation = evaluate(
        EvaluateConfig(home=home.path, world="ring", clips=8, prompts=2, batch=16, steps=(1, 2), sampler=sampler)
    )
    path = report(ReportConfig(home=home.path, evaluation=evaluation.reference))
    return home, evaluation, path, path.read_text(encoding="utf-8")


def test_the_page_has_every_section_and_loads_nothing(made):
    *_, path, text = made
    assert path.name == "ring-evaluation@v1.html"
    seen = Page(text)
    assert tuple(seen.sections) == SECTIONS
    assert all(link.startswith(("data:image/", "#")) for link in seen.loads)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert not seen.tags & {"script", "link", "iframe", "object"}
    assert {link for link in seen.loads if link[0] == "#"} == {f"#{key}" for key in SECTIONS}


def test_the_numbers_on_the_page_are_the_artifact_s(made):
    _, evaluation, _, text = made
    seen, m = Page(text).sections, evaluation.metrics
    assert f"{m['tokenizer_psnr_db']:.2f} dB" in seen["glance"]
    assert f"{m['nmi_effect']:.2f}" in seen["meaning"]
    assert f"{m['dpsnr_forced_db']:+.2f} dB" in seen["control"]
    assert f"{m['frd3d_frozen']:.2f}" in seen["control"]
    bars = json.loads((evaluation.path / "measures.json").read_text())["bars"]
    assert seen["glance"].count("reached") == sum(bar["passed"] for bar in bars)
    assert seen["glance"].count("missed") == len(bars) - sum(bar["passed"] for bar in bars)


def test_every_action_has_its_row_and_every_picture_is_in_it(made):
    _, evaluation, _, text = made
    assert re.findall(r"<b>Action (\d)</b>", text) == ["0", "1", "2"]
    for name in ("action-1.png", "rollouts.png", "reconstructions.png"):
        assert data_uri((evaluation.path / name).read_bytes()) in text
    for name in ("dpsnr.svg", "rollouts.svg", "refinement.svg"):
        assert (evaluation.path / name).read_text() in text


def test_the_footage_is_shown_with_outcomes_reasons_and_escaped_titles(made):
    data = Page(made[3]).sections["data"]
    assert "2 clips to learn from and 3 held out" in data
    assert "Ring <0>" in data
    assert "rejected, negating_word: movie" in data
    assert "<b>Ring &lt;0&gt;</b>" in made[3]


def test_curves_and_lineage_are_told(made):
    _, evaluation, _, text = made
    seen = Page(text).sections
    assert "ring@v1" in seen["training"]
    assert "loss" in seen["training"]
    for link in ("ring@0", "ring@v1", "ring-evaluation@v1", "lampworks evaluate ring@v1 --dataset ring@0"):
        assert link in seen["lineage"]
    assert evaluation.fingerprint[:12] in seen["lineage"]


def test_a_home_without_tracking_still_has_a_report(made, tmp_path):
    home, *_ = made
    shutil.copytree(home.path, tmp_path / "home", ignore=shutil.ignore_patterns("mlflow.db"))
    path = report(ReportConfig(home=tmp_path / "home", evaluation="ring-evaluation"))
    assert "no curves" in Page(path.read_text()).sections["training"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("ring-evaluatoin", "did you mean ring-evaluation"), ("ring", "ring@v1 is a world, a evaluation is needed")],
)
def test_bad_input_is_one_clear_sentence(made, name, said):
    with pytest.raises(UserError, match=said):
        report(ReportConfig(home=made[0].path, evaluation=name))


def test_a_dataset_that_is_gone_is_named(made, tmp_path):
    shutil.copytree(made[0].path, tmp_path / "home", ignore=shutil.ignore_patterns("datasets", "mlflow.db"))
    with pytest.raises(UserError, match="no dataset 'ring'"):
        report(ReportConfig(home=tmp_path / "home", evaluation="ring-evaluation"))


# -- figures -----------------------------------------------------------------------------------------------------


def test_charts_are_whole_svg_with_every_point_in_range():
    band = ([0.5, -1.0, 2.0], [1.5, 3.0, 4.0])
    lines = [
        Line(label="a < b", x=[1, 2, 3], y=[1, 1, 3], band=band),
        Line(label="c", x=[1, 2, 3], y=[0, float("nan"), 9]),
    ]
    root = ElementTree.fromstring(line_chart(lines, x_label="t", y_label="dB", zero=True, whole=True))
    places = [p.split(",") for e in root.iter() if "points" in e.attrib for p in e.attrib["points"].split()]
    assert len(places) == 3 + 6 + 2
    assert all(0 <= float(x) <= SIZE[0] and 0 <= float(y) <= SIZE[1] for x, y in places)
    assert "a < b" in [e.text for e in root.iter()]


def test_long_curves_are_thinned_to_means():
    drawn = line_chart([Line(label="", x=range(10_000), y=[5.0] * 10_000)], x_label="", y_label="")
    points = ElementTree.fromstring(drawn).find("{http://www.w3.org/2000/svg}polyline").attrib["points"].split()
    assert len(points) == 240
    assert len({p.split(",")[1] for p in points}) == 1


@pytest.mark.parametrize("values", [[], [3.0], [1.0, float("nan"), 2.0, 2.0]])
def test_histograms_count_every_finite_value(values):
    titles = [
        e.text for e in ElementTree.fromstring(histogram(values, label="x")).iter("{http://www.w3.org/2000/svg}title")
    ]
    assert sum(int(t.split(": ")[1]) for t in titles) == max(1, sum(v == v for v in values))


def test_sheets_hold_the_frames_they_were_given():
    import cv2
    import numpy as np

    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 10, 3), np.uint8)
    picture = sheet([frames[0], frames[1, :2]], gap_px=2, least_px=16)
    assert picture.shape == (16 + 2 + 16, 3 * 20 + 2 * 2, 3)
    assert (picture[18:, 22:42] == enlarge(frames[1, 1], 16)).all()
    assert (strip(frames[0])[:, 10:20] == frames[0, 1]).all()
    back = cv2.imdecode(np.frombuffer(png(picture), np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert (back == picture).all()


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="--pictures is 0"):
        replace(ReportConfig(), pictures=0)
