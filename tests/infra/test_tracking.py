import json
import time

import numpy as np
import pytest
from mlflow import MlflowClient

from infra.config import TrackingConfig
from infra.tracking import NOTE_TAG, Run, flatten
from pipelines.figures import png


def open_run(home, key="k1", uri=None, **more):
    folder = home.runs / "tracked"
    return Run(TrackingConfig(uri=uri), home, name="tokenizer", key=key, folder=folder, **more)


@pytest.fixture
def finished(tracked_home):
    """A run that was said in two processes' lifetimes: the second repeats steps, as after a restart."""
    first = open_run(tracked_home)
    first.params({"model": {"width": 32, "layers": 2}, "steps": 8})
    first.tags({"parent.dataset": "platformers@3"})
    for step in range(5):
        first.metrics(step, {"loss": 1.0 / (step + 1), "grad_norm": float("nan")})
    first.event("started")
    assert first.flush()
    again = open_run(tracked_home)
    again.params({"model": {"width": 32, "layers": 2}, "steps": 8})
    for step in range(2, 8):
        again.metrics(step, {"loss": 1.0 / (step + 1)})
    again.event("continued at step 2")
    picture = tracked_home.runs / "reconstruction.png"
    picture.write_bytes(png(np.full((8, 8, 3), 77, np.uint8)))
    again.file(picture, "pictures")
    again.close()
    return again


def test_a_restart_goes_on_with_the_same_run(finished, tracked_home):
    client = MlflowClient(tracked_home.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("lampworks").experiment_id])
    assert len(runs) == 1
    run = runs[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "32"
    assert run.data.tags["parent.dataset"] == "platformers@3"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(s, 1.0 / (s + 1)) for s in range(8)]
    note = run.data.tags[NOTE_TAG]
    assert note.index("started") < note.index("continued at step 2")
    assert [f.path for f in client.list_artifacts(run.info.run_id, "pictures")] == ["pictures/reconstruction.png"]

    assert list((tracked_home.path / "mlartifacts").rglob("reconstruction.png"))


def test_an_outage_buffers_and_the_records_arrive_later(tracked_home):
    away = open_run(tracked_home, key="k2", uri="http://127.0.0.1:9")
    away.metrics(0, {"loss": 3.0})
    away.close()
    waiting = (tracked_home.runs / "tracked" / "tracking.jsonl").read_text().splitlines()
    assert [json.loads(w)["kind"] for w in waiting] == ["metrics", "status"]
    back = open_run(tracked_home, key="k2")
    back.metrics(1, {"loss": 2.0})
    back.close()
    client = MlflowClient(tracked_home.tracking_uri)
    assert [m.value for m in client.get_metric_history(back.run_id, "loss")] == [3.0, 2.0]


def test_what_the_store_refuses_is_told_and_does_not_hold_up_the_rest(tracked_home, caplog):
    run = open_run(tracked_home)
    run.tags({"bad\nname": "value"})
    run.params({"also bad \t name": 1})
    run.params({"width": 32})
    run.metrics(0, {"loss": 1.0})
    run.close()
    kept = MlflowClient(tracked_home.tracking_uri).get_run(run.run_id)
    assert kept.info.status == "FINISHED"
    assert kept.data.params == {"width": "32"} and kept.data.metrics["loss"] == 1.0
    assert caplog.text.count(" refuses tags of") == caplog.text.count(" refuses params of") == 1
    assert "does not take records" not in caplog.text


def test_a_torn_line_of_a_killed_process_is_passed_over(tracked_home):
    run = open_run(tracked_home)
    run.metrics(0, {"loss": 1.0})
    run.close()
    with (tracked_home.runs / "tracked" / "tracking.jsonl").open("a") as file:
        file.write('{"kind": "metr\n')
    again = open_run(tracked_home)
    again.metrics(1, {"loss": 0.5})
    again.close()
    client = MlflowClient(tracked_home.tracking_uri)
    assert [m.value for m in client.get_metric_history(again.run_id, "loss")] == [1.0, 0.5]


def test_a_long_timeline_keeps_its_beginning_and_its_end(tracked_home):
    run = open_run(tracked_home)
    for n in range(400):
        run.event(f"event number {n}")
    run.close()
    note = MlflowClient(tracked_home.tracking_uri).get_run(run.run_id).data.tags[NOTE_TAG]
    assert "event number 0" in note.split("\n")[0]
    assert "event number 399" in note
    assert len(note) < 5000


def test_flatten_names_nested_values():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_a_run_says_what_its_machine_is_busy_with_and_counts_on_after_a_restart(tracked_home):
    name = "system/cpu_utilization_percentage"
    client = MlflowClient(tracked_home.tracking_uri)
    for least in (1, 2):
        run = open_run(tracked_home, send_every_s=0.05, sample_every_s=0.05)
        run.metrics(least, {"loss": 1.0})
        until = time.monotonic() + 60
        while not (run.run_id and len(points(client, run, name)) > least) and time.monotonic() < until:
            time.sleep(0.1)
        run.close()
    steps = [step for step, _ in points(client, run, name)]
    assert steps == sorted(set(steps)) and len(steps) > 2
    assert all(0 <= value <= 100 for _, value in points(client, run, name))
    assert points(client, run, "system/system_memory_usage_megabytes")[-1][1] > 10
    assert [step for step, _ in points(client, run, "loss")] == [1, 2]


def points(client, run, name):
    return [(m.step, m.value) for m in client.get_metric_history(run.run_id, name)]
