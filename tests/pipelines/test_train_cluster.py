"""The whole of it on Ray Train: workers and drivers are killed with SIGKILL while they train."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from pipelines.checkpoints import Checkpoints
from pipelines.jobs import plan_job
from pipelines.train import Interrupted, train
from pipelines.train_config import KeepConfig
from tests.pipelines.ranks import EACH, config, losses, run_ranks


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


@pytest.mark.slow
def test_a_killed_controller_is_replaced(place, ray_cluster):
    """The actor of Ray Train that looks after the workers; they go with it."""
    settings = config(place, name="led", workers=2, steps=40, checkpoint_every=4)
    job = plan_job(settings)

    def kill():
        ours = psutil.Process().children(recursive=True)
        [led] = [p for p in ours if p.is_running() and "".join(p.cmdline()).startswith("ray::TrainController")]
        led.kill()

    when(job, 6, kill)
    train(settings)
    starts = [line["at"] for line in journal(job) if "pid" in line]
    assert len(starts) == 2 and starts[1] >= 4
    assert any("the controller of the workers died" in line.get("event", "") for line in journal(job))
    assert still_equal(settings)


def test_a_death_between_the_last_checkpoint_and_the_result_is_survived(place, ray_cluster):
    settings = config(place, name="late", workers=2)
    job = plan_job(settings)
    run_ranks([(settings, None)])
    shutil.rmtree(job.folder / "result")
    (job.folder / "result").mkdir()
    (job.folder / "result" / ".weights-half").touch()
    made = train(settings)
    assert [line["at"] for line in journal(job) if "pid" in line] == [0, 6]
    assert made.files.keys() == {"model.safetensors", "config.json"}


@pytest.mark.slow
def test_two_workers_that_share_every_matrix_are_given_the_same_samples(place, ray_cluster):
    """The loop checks the samples; the losses are those of one process."""
    group, plain = config(place, name="group", workers=2, tensor=2), config(place, name="plain")
    train(group)
    train(plain)
    alone = losses(plan_job(plain).folder)
    assert losses(plan_job(group).folder) == pytest.approx(alone, rel=1e-5)


DRIVER = """
import json, sys
from infra.config import Home
from pipelines.train import train
from tests.pipelines.ranks import config
train(config(Home(sys.argv[1]), **json.loads(sys.argv[2])))
"""
FEW = {"name": "driven", "workers": 2, "steps": 40, "checkpoint_every": 4}


def driver(place, changes):
    """The training in a process of its own, in a session of its own as a terminal's would be."""
    words = [sys.executable, "-c", DRIVER, str(place.path), json.dumps(changes)]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs don't hear it
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard)


def still_equal(settings):
    """Whether a training that went through something has the losses of two processes that went through nothing."""
    still = replace(settings, name="still")
    run_ranks([(still, None)])
    return losses(plan_job(settings).folder) == losses(plan_job(still).folder)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "zero", "seed"), EACH)
def test_a_driver_killed_at_random_steps_goes_on_by_the_same_command(place, stage, zero, seed):
    """And a worker in its second life."""
    rng = random.Random(seed)
    changes = {**FEW, "stage": stage, "zero": zero, "seed": seed}
    settings = config(place, **changes)
    job = plan_job(settings)
    first, second, third = sorted(rng.sample(range(1, 40), 3))
    for step in (first, third):
        process = driver(place, changes)
        when(job, step, process.kill)
        if step == third:
            when(job, second, lambda: kill_worker(job))
        _, said = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, said
    train(settings)
    starts = [line["at"] for line in journal(job) if "pid" in line]
    assert starts[0] == 0 and len(starts) >= 3
    assert still_equal(settings)


@pytest.mark.parametrize(
    ("ending", "workers"),
    [(signal.SIGINT, 2), (signal.SIGTERM, 0), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow)],
)
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(place, ending, workers):
    """To the whole group, as a terminal sends it; SIGTERM to the driver, as a scheduler does."""
    changes = {**FEW, "workers": workers, "steps": 4000, "checkpoint_every": 10_000}
    settings = config(place, **changes)
    job = plan_job(settings)
    process = driver(place, changes)
    when(job, 3, lambda: (os.killpg if ending == signal.SIGINT else os.kill)(process.pid, ending))
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "with a checkpoint: the same command continues it" in said.splitlines()[-1]
    (_, manifest), _ = Checkpoints(job.folder, settings.keep).choose()
    assert 3 <= manifest["step"] < 4000
    assert f"training stopped at step {manifest['step']} " in said


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_worker_that_hangs_is_noticed_and_started_again(place, ray_cluster, zero):
    settings = config(place, **{**FEW, "name": f"hung{zero}", "zero": zero, "hang_s": 30.0})
    job = plan_job(settings)
    stopped = []

    def stop():
        stopped.append(time.time())
        os.kill([line["pid"] for line in journal(job) if "pid" in line][-1], signal.SIGSTOP)

    when(job, 6, stop)
    train(settings)
    began = [line["time_s"] for line in journal(job) if "pid" in line]
    assert began[1] - stopped[0] > 20  # a stopped one was waited for, and then not for ever
    assert still_equal(settings)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_checkpoints_in_a_bucket_carry_killed_workers_on(place, ray_cluster, bucket, zero):
    uri, options = bucket
    settings = config(place, **{**FEW, "zero": zero, "keep": KeepConfig(to=f"{uri}/runs{options}")})
    job = plan_job(settings)
    when(job, 10, lambda: kill_worker(job))
    train(settings)
    starts = [line["at"] for line in journal(job) if "pid" in line]
    assert len(starts) == 2 and starts[1] >= 4
    assert not (job.folder / "checkpoints").exists()
    assert still_equal(replace(settings, keep=KeepConfig()))


@pytest.mark.slow
def test_workers_without_enough_memory_are_one_sentence(place, monkeypatch):
    """Ray's own watch over memory, told to end them at once."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    changes = {**FEW, "name": "heavy", "steps": 4000, "max_failures": 1}
    process = driver(place, changes)
    _, said = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "training failed with OutOfMemoryError" in said.splitlines()[-1]
    assert "lower --micro-batch, raise --zero, or give the workers more memory" in said.splitlines()[-1]


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
