import dataclasses
import re

import pytest

from pipelines.config import FilterConfig, ReportConfig
from pipelines.curate import curate
from pipelines.report import report
from tests.pipelines.clips import write_dataset
from tests.pipelines.footage import arcade, corpus, film, settings


@pytest.fixture(scope="module")
def curated(tmp_path_factory, ray_cluster):
    root = tmp_path_factory.mktemp("reported")
    raw = corpus(root / "raw", good=2)
    film(raw, "long", arcade(200, seed=3), uploader="<b>other</b>")
    film(raw, "longer", arcade(200, seed=3)[:, :, ::-1], uploader="<b>other</b>")
    config = settings(root, raw, clip_frames=40)
    return config, curate(config)


def page_of(result):
    return (result.path.parents[1] / "reports" / f"{result.dataset.name}@{result.version}.html").read_text()


def table(page, key):
    """The rows of a section's last table, as lists of cells."""
    section = page.split(f'<section id="{key}">')[1].split("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section.split("<table>")[-1])
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows[1:]]


def test_a_curation_leaves_its_page_and_the_page_loads_nothing(curated):
    config, result = curated
    page = page_of(result)
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|src=\"(?!data:)", page)
    path = report(ReportConfig(home=config.home, evaluation="small"))
    assert path.read_text() == page
    before = path.stat().st_mtime_ns
    curate(config)
    assert path.stat().st_mtime_ns == before


def test_a_dataset_without_windows_has_a_page_too(home):
    write_dataset(home)
    page = report(ReportConfig(home=home.path, evaluation="toys@0")).read_text()
    assert "6 videos" in page
    assert [row[:2] for row in table(page, "uploaders")] == [["unknown", "6"]]


def test_every_reason_has_its_pictures(curated):
    page = page_of(curated[1])
    for reason in ("static", "black", "too_short", "negating_word", "no_sidecar", "unreadable", "copy"):
        assert f"<h3>Videos: {reason}: " in page
    for reason in ("static", "black", "copy"):  # copies were stored before they were found: shown from the clip itself
        sheet = page.split(f"<h3>Clips: {reason}: ")[1].split("<h3>")[0].split("</section>")[0]
        assert 'src="data:image/jpeg;base64,/9j/' in sheet
        assert "nothing to show" not in sheet


def test_limits_stand_in_the_distributions(curated):
    config, result = curated
    assert "<title>limit 0.8</title>" in page_of(result)
    tight = curate(dataclasses.replace(config, filters=FilterConfig(max_static_share=0.75)))
    assert "<title>limit 0.75</title>" in page_of(tight)
    assert "<title>limit 0.8</title>" not in page_of(tight)


def test_uploaders_and_costs_are_counted(curated):
    page = page_of(curated[1])
    rows = {row[0]: row[1:] for row in table(page, "uploaders")}
    assert rows["&lt;b&gt;other&lt;/b&gt;"] == ["2", "4", "2", "50%"]
    assert rows["unknown"][0] == "1"
    ledger = curated[1].dataset.video_table(["uploader", "clips", "dropped_clips"]).to_pylist()
    kept = sum(r["clips"] - len(r["dropped_clips"] or ()) for r in ledger if r["uploader"] == "someone" and r["clips"])
    assert rows["someone"][2] == str(kept)
    spent = [float(row[1]) for row in table(page, "cost")]
    assert spent == sorted(spent, reverse=True)
    assert len(spent) > 5
