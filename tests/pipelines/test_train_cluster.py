"""The whole of it on Ray Train: workers and drivers are killed with SIGKILL while they train."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from pipelines.checkpoints import Checkpoints
from pipelines.stages import plan_job
from pipelines.train import Interrupted, train
from tests.pipelines.ranks import config, losses, run_ranks


def journal(job):
    path = job.folder / "progress.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def when(job, step, act):
    """In a thread: `act` once the journal has told of this step."""

    def wait():
        while not any(line.get("step", -1) >= step for line in journal(job)):
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_worker(job):
    """SIGKILL for the newest rank 0."""
    os.kill([line["pid"] for line in journal(job) if "pid" in line][-1], signal.SIGKILL)


def test_a_killed_worker_changes_nothing(place, ray_cluster, caplog):
    """Two workers on Ray Train, one of them killed: losses are those of two plain processes, bit by bit."""
    caplog.set_level("INFO", logger="pipelines")
    killed = config(place, name="killed", workers=2, steps=16, checkpoint_every=4)
    job = plan_job(killed)
    when(job, 6, lambda: kill_worker(job))
    made = train(killed)
    starts = [line["at"] for line in journal(job) if "pid" in line]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] in (4, 8, 12, 16)
    still = replace(killed, name="still")
    run_ranks([(still, None)])
    assert losses(job.folder) == losses(plan_job(still).folder)
    assert made.files.keys() >= {"model.safetensors", "config.json"}
    assert "step 16/16 | loss" in caplog.text and "data wait" in caplog.text
    assert f"continued at step {starts[1]} with 2 workers" in caplog.text


DRIVER = """
import sys
from dataclasses import replace
from infra.config import Home
from pipelines.train import train
from tests.pipelines.ranks import config
train(config(Home(sys.argv[1]), name="driven", workers=2, steps=40, checkpoint_every=4, stage=sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "world"])
def test_a_killed_driver_goes_on_by_the_same_command(place, stage):
    settings = config(place, name="driven", workers=2, steps=40, checkpoint_every=4, stage=stage)
    job = plan_job(settings)
    for step in (6, 19):
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(place.path), stage])
        when(job, step, driver.kill)
        assert driver.wait(300) == -signal.SIGKILL
    train(settings)
    starts = [line["at"] for line in journal(job) if "pid" in line]
    assert starts[0] == 0 < starts[1] < starts[2]
    still = replace(settings, name="still")
    run_ranks([(still, None)])
    assert losses(job.folder) == losses(plan_job(still).folder)


@pytest.mark.slow
def test_a_request_to_stop_leaves_a_checkpoint_and_fewer_workers_go_on(place, ray_cluster):
    settings = config(place, name="stopped", workers=2, steps=40, checkpoint_every=100)
    job = plan_job(settings)
    when(job, 5, (job.folder / "stop").touch)
    with pytest.raises(Interrupted, match="stopped at step .* the same command continues it"):
        train(settings)
    (_, manifest), _ = Checkpoints(job.folder, settings.keep).choose()
    assert 5 <= manifest["step"] < 40
    train(replace(settings, workers=1))
    worlds = losses(job.folder, "world")
    assert (worlds[1], worlds[40]) == (2, 1)
    plain = config(place, name="plain", steps=40, checkpoint_every=100)
    train(plain)
    assert losses(job.folder) == pytest.approx(losses(plan_job(plain).folder), rel=1e-3)
