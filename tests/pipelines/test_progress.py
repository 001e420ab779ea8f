"""The driver's view of a training: what its journal becomes in MLflow and on the console."""

import json
import socket
import time

import pytest
from mlflow import MlflowClient

from infra.config import TrackingConfig
from infra.plan import TrainingPlan
from infra.tracking import Run
from pipelines.progress import Follower
from pipelines.workers import telling_of_node

PLAN = TrainingPlan(parameters=1000, frame_flops=2e9, frames=4, tokens=16, activation_bytes=1.0, batch=8,
                    micro_batch=4, steps=20, workers=2)  # fmt: skip
STEP = {"time_s": 1.0, "world": 2, "loss": 2.0, "step_s": 0.5, "samples_per_s": 16.0, "data_wait_s": 0.1}


@pytest.fixture
def folder(home):
    path = home.runs / "followed"
    path.mkdir(parents=True)
    return path


def write(folder, *lines):
    with (folder / "progress.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def followed(home, folder, **more):
    run = Run(TrackingConfig(), home, name="told", key="told", folder=folder)
    follower = Follower(folder, run, PLAN, **more)
    follower.follow()
    return follower


def points(home, run, name):
    return [(m.step, m.value) for m in MlflowClient(home.tracking_uri).get_metric_history(run.run_id, name)]


def test_use_of_the_machine_is_against_what_was_measured_or_the_data_sheet(tracked_home, folder, caplog):
    caplog.set_level("INFO", logger="pipelines")
    write(folder, {"ceiling_flops": 256e9}, {"step": 10, **STEP})
    measured = followed(tracked_home, folder)
    assert measured.final["tokens_per_s"] == 16 * 4 * 16
    assert measured.final["mfu"] == pytest.approx(16 * 4 * 2e9 / (2 * 256e9))
    assert (
        "step 10/20 | loss 2.0000 | dt 500 ms | 16.0 samples/s | mfu 25% | data wait 20% | eta 00:00:05" in caplog.text
    )
    (folder / "followed").unlink()
    by_data_sheet = followed(tracked_home, folder, peak_flops=512e9)
    assert by_data_sheet.final["mfu"] == measured.final["mfu"] / 2
    measured.run.close()
    by_data_sheet.run.close()


def test_a_second_driver_goes_on_where_the_first_was_and_says_nothing_twice(tracked_home, folder, caplog):
    caplog.set_level("INFO", logger="pipelines")
    write(folder, {"ceiling_flops": 1e9}, {"step": 5, **STEP}, {"event": "began"})
    first = followed(tracked_home, folder)
    first.run.close()
    write(folder, {"looked": 5, "held_out/dpsnr_db": 0.25}, {"step": 5, **STEP, "loss": 3.0}, {"step": 6, **STEP})
    again = followed(tracked_home, folder)
    again.run.close()
    assert points(tracked_home, again.run, "loss") == [(5, 2.0), (6, 2.0)]
    assert points(tracked_home, again.run, "held_out/dpsnr_db") == [(5, 0.25)]
    assert caplog.text.count("began") == 1
    assert again.final["held_out/dpsnr_db"] == 0.25


def test_what_is_trained_anew_after_a_rollback_is_told_anew(tracked_home, folder):
    """Also by a driver that starts in between; the machine's own numbers only go on."""
    bad = [{"step": step, **STEP, "loss": 9.0} for step in (4, 5, 6)]
    write(folder, {"step": 3, **STEP}, *bad, {"node": "gpu-7", "system/gpu_0_utilization_percentage": 80.0},
          {"rolled_back": 4})  # fmt: skip
    first = followed(tracked_home, folder)
    first.run.close()
    anew = [{"step": step, **STEP, "loss": 1.0} for step in (3, 4, 5, 6, 7)]
    write(folder, {"node": "gpu-7", "system/gpu_0_utilization_percentage": 60.0}, *anew)
    again = followed(tracked_home, folder)
    again.run.close()
    told = points(tracked_home, again.run, "loss")
    assert sorted(told) == [(3, 2.0), (4, 9.0), (5, 1.0), (5, 9.0), (6, 1.0), (6, 9.0), (7, 1.0)]
    assert points(tracked_home, again.run, "system/gpu-7/gpu_0_utilization_percentage") == [(0, 80.0), (1, 60.0)]


def test_a_node_that_is_not_the_drivers_tells_how_busy_it_is(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")

    def told():
        path = folder / "progress.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    with telling_of_node(folder, socket.gethostname(), every_s=0.01):
        time.sleep(0.2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with telling_of_node(folder, "the-drivers", every_s=0.01):
        time.sleep(0.2)
    assert told() == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    until = time.monotonic() + 60
    with telling_of_node(folder, "the-drivers", every_s=0.01):
        while len(told()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
    first = told()[0]
    assert first["node"] == socket.gethostname()
    assert 0 <= first["system/cpu_utilization_percentage"] <= 100 and first["system/system_memory_usage_megabytes"] > 10
