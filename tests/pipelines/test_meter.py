import logging
import time
import urllib.request

import pytest
import ray

from pipelines import meter
from pipelines.curate import curate
from pipelines.manifest import Plan
from tests.pipelines.footage import film, scroll, settings, sidecar
from tests.pipelines.remote import Web
from tests.pipelines.test_sources import write


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_cluster):
    """A curation from a web server on a bad day: home, source, server (still up) and its result."""
    folder = tmp_path_factory.mktemp("web")
    for n, name in enumerate(["good", "gone", "secret", "down", "shaky"]):
        film(folder, name, scroll(90, seed=n))
    (folder / "text.mp4").write_text("no video at all\n" * 50)
    sidecar(folder / "text.mp4", duration=4.5)
    (folder / "gone.mp4").unlink()
    with Web(folder) as web:
        web.troubles |= {"/secret.mp4": [403], "/down.mp4": [503] * 2, "/shaky.mp4": ["cut"]}
        names = ("good", "gone", "secret", "down", "shaky", "text")
        source = write(folder / "list.csv", [{"uri": f"{web.url}/{name}.mp4"} for name in names])
        yield folder / "home", source, web, curate(far(folder / "home", source))


def far(home, source, **changes):
    from pipelines.config import FetchConfig

    return settings(home, source, **{"fetch": FetchConfig(retries=1), **changes})


def ends(result):
    rows = result.dataset.video_table(["video_id", "outcome", "stage", "reason"]).to_pylist()
    return {row["video_id"]: (row["outcome"], row["stage"], row["reason"]) for row in rows}


def test_what_can_not_be_fetched_has_its_row(run):
    found = ends(run[3])
    assert {found[name][0] for name in ("good", "shaky")} == {"kept"}
    assert {name: found[name] for name in ("gone", "secret", "down", "text")} == {
        "gone": ("dead_letter", "fetch", "not_found"),
        "secret": ("dead_letter", "fetch", "forbidden"),
        "down": ("dead_letter", "fetch", "unreachable"),
        "text": ("dead_letter", "decode", "unreadable"),
    }
    rows = run[3].dataset.video_table(["video_id", "detail"]).to_pylist()
    assert {r["video_id"]: r["detail"] for r in rows}["down"] == "the server answers 503 Service Unavailable (2 tries)"


def test_counters_are_on_rays_metrics_endpoint(run):
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        'lampworks_curate_videos_total{outcome="dead_letter",reason="unreachable"}': 1,
        'lampworks_curate_videos_total{outcome="kept",reason="none"}': 2,
        "lampworks_curate_clips_total": 4,
        "lampworks_curate_fetch_retries_total": 2,
        "lampworks_curate_video_hours_total": 8.9 / 3600,
        'lampworks_curate_stage_seconds_total{stage="decode"}': 0.01,
    }
    until, seen = time.monotonic() + 90, {}
    while time.monotonic() < until and not all(seen.get(name, 0) >= least for name, least in wanted.items()):
        time.sleep(1)
        seen = counters(urllib.request.urlopen(address, timeout=30).read().decode())
    assert {name: seen.get(name, 0) >= least for name, least in wanted.items()} == dict.fromkeys(wanted, True), seen


def counters(page):
    """Our counters with our own labels only, summed."""
    found = {}
    for line in page.splitlines():
        if line.startswith("ray_lampworks_curate"):
            head, _, value = line.rpartition(" ")
            name, _, labels = head.rstrip("}").removeprefix("ray_").partition("{")
            kept = [part for part in labels.split(",") if part.split("=")[0] in ("outcome", "reason", "stage")]
            key = name + (f"{{{','.join(sorted(kept))}}}" if kept else "")
            found[key] = found.get(key, 0) + float(value)
    return found


def test_an_outage_is_made_good_by_another_run(run):
    home, source, web, before = run
    assert curate(far(home, source)).version == before.version  # not by itself: it may be out for good
    web.troubles["/down.mp4"] = [503] * 2
    still = curate(far(home, source, retry=("unreachable",)))
    assert ends(still)["down"] == ("dead_letter", "fetch", "unreachable")
    after = curate(far(home, source, retry=("unreachable",)))
    assert ends(after)["down"] == ("kept", "filter", "")
    assert {k: v for k, v in ends(after).items() if k != "down"} == {
        k: v for k, v in ends(before).items() if k != "down"
    }
    assert len(ends(after)) == after.dataset.video_table(["video_id"]).num_rows
    assert after.clips == before.clips + 2


def test_the_line_says_how_much_how_fast_and_where_time_goes(ray_cluster, caplog):
    plan = Plan([row("u1", "a", 3600.0), row("u1", "b", 3600.0), row("u2", "c", 7200.0)])
    fields = ("outcome", "reason", "clips", "dropped_clips", "duration_s", "windows")
    ends = [
        ("kept", "", 3, [], 3600.0, [{"reason": ""}] * 3),
        ("rejected", "static", 1, ["x"], 3600.0, [{"reason": "static"}]),
    ]
    rows = [dict(zip(fields, end, strict=True)) for end in ends]
    counting = meter.Meter(plan, ["u1", "u2"], 3600.0)
    with caplog.at_level(logging.INFO, logger="pipelines.meter"):
        counting.add(meter.facts(rows, {"fetch": 6.0, "decode": 3.0, "write": 1.0}, 2))
    line = caplog.messages[-1]
    assert line.startswith("curate | 2/3 videos | 2.00 h | 3 clips | kept 75% | ")
    assert line.endswith("| fetch 60%, decode 30%, write 10%")


def row(unit, video, seconds):
    ledger = {"duration_s": seconds}
    return {"unit_id": unit, "video_id": video, "path": video, "verdict": False, "peek": False, "have": [], **ledger}


def test_silence_is_explained(ray_cluster, caplog, monkeypatch):
    monkeypatch.setattr(meter, "QUIET_S", 0.2)
    with (
        caplog.at_level(logging.INFO, logger="pipelines.meter"),
        meter.Meter(Plan([row("u", "v", 1.0)]), ["u"], 3600.0),
    ):
        until = time.monotonic() + 30
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.05)
    assert "no unit finished for" in caplog.messages[0]
    assert "CPUs" in caplog.messages[0]
