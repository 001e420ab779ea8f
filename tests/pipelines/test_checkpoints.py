import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from infra.config import UserError
from pipelines.checkpoints import Checkpoints, Writer, at_hand, one_works
from pipelines.jobs import plan_job
from pipelines.train import train
from pipelines.train_config import KeepConfig
from tests.pipelines.ranks import config, losses
from tests.pipelines.remote import on_small_disk


@pytest.fixture(params=["folder", "bucket"])
def target(request, tmp_path):
    """Where checkpoints go: the training's folder, or a real object store."""
    if request.param == "folder":
        return None
    uri, options = request.getfixturevalue("bucket")
    return f"{uri}/kept{options}"


def write(kept, step, loss=1.0, ranks=1, text="whole"):
    for rank in range(ranks):
        kept.share(step, rank, {f"state/part-{rank}": lambda path: path.write_text(text)})
    kept.commit({"step": step, "loss": loss, "world": ranks})


def steps(kept):
    return sorted(int(path.name[5:]) for path in kept.folder.glob("step-*"))


def test_kept_by_policy(tmp_path, target):
    kept = Checkpoints(tmp_path, KeepConfig(last=2, every=40, best=True, to=target))
    for step, loss in zip(range(10, 100, 10), [9, 8, 1, 7, 6, 5, 4, 3, 2], strict=True):
        write(kept, step, loss)
    assert steps(kept) == [30, 40, 80, 90]


def test_the_one_before_the_first_bad_step_is_kept_too_and_can_be_gone_back_to(tmp_path):
    kept = Checkpoints(tmp_path, KeepConfig())
    for step in range(10, 60, 10):
        kept.floor = 25 if step > 20 else None
        write(kept, step)
    assert steps(kept) == [20, 40, 50]
    kept.forget_after(25)
    assert kept.choose()[0][1]["step"] == 20


def test_half_written_ones_are_none_and_damaged_ones_are_put_aside(tmp_path, target):
    kept = Checkpoints(tmp_path, KeepConfig(to=target))
    for step in (10, 20):
        write(kept, step, ranks=2)
    kept.share(30, 0, {"part": lambda path: path.write_text("ha")})
    found, damaged = kept.choose()
    assert (found[1]["step"], damaged, steps(kept)) == (20, [], [10, 20])
    (kept.path(20) / "state/part-1").write_bytes(b"other")
    found, damaged = kept.choose()
    assert found[1]["step"] == 10 and kept.chosen() == found
    assert "step-000000020 is damaged (state/part-1 differs from what was written): falling back" in damaged[0]
    assert (kept.folder / "damaged-step-000000020" / "manifest.json").exists()
    (kept.path(10) / "manifest.json").write_text('{"step"')
    found, damaged = kept.choose()
    assert found is None and len(damaged) == 1
    assert kept.chosen() is None


def test_rank_0_waits_for_the_slowest_rank(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, KeepConfig())
    kept.share(10, 0, {"a": lambda path: path.write_text("a")})
    slow = threading.Timer(0.3, kept.share, (10, 1, {"b": lambda path: path.write_text("b")}))
    slow.start()
    kept.commit({"step": 10, "world": 2})
    assert sorted(kept.choose()[0][1]["files"]) == ["a", "b"]
    slow.join()
    monkeypatch.setattr("pipelines.checkpoints.PATIENCE_S", 0.1)
    with pytest.raises(TimeoutError, match="2 of 3 ranks wrote their share of .*step-000000010"):
        kept.commit({"step": 10, "world": 3})


def test_one_may_work_longer_than_others_would_wait_in_a_collective(tmp_path):
    done, told = tmp_path / "done", []
    done.touch()  # of a start that was killed
    together = threading.Barrier(2, timeout=0.3)

    def rank(mine):
        one_works(lambda: (time.sleep(1.0), told.append("worked")), mine, done, together.wait)
        told.append("on")

    ranks = [threading.Thread(target=rank, args=(mine,)) for mine in (True, False)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(20)
    assert told == ["worked", "on", "on"] and not done.exists()


def test_files_of_a_bucket_are_at_hand_for_a_while(tmp_path, target):
    kept = Checkpoints(tmp_path / "job", KeepConfig(to=target))
    write(kept, 10)
    waited = []
    with at_hand(kept.path(10), True, lambda: waited.append(1)) as folder:
        assert (folder / "state/part-0").read_text() == "whole"
    assert folder.exists() == (target is None) and len(waited) == (0 if target is None else 3)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, endpoint):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints to .*file/job"):
        Checkpoints(tmp_path / "job", KeepConfig(to=str(tmp_path / "file"))).prove()
    nowhere = f"s3://nowhere/x?endpoint_override={endpoint}&scheme=http&region=us-east-1"
    with pytest.raises(UserError, match="cannot write checkpoints to s3://nowhere/x.*NoSuchBucket|NO_SUCH_BUCKET"):
        Checkpoints(tmp_path / "job", KeepConfig(to=nowhere)).prove()
    with pytest.raises(UserError, match="ftp:// is no object store"):
        Checkpoints(tmp_path / "job", KeepConfig(to="ftp://x/y"))


def test_a_writer_does_one_thing_at_a_time_and_its_errors_arrive():
    writer, told = Writer(), []
    writer.start(lambda: (time.sleep(0.2), told.append(1)))
    assert not told
    writer.start(lambda: told.append(2))
    writer.wait()
    assert told == [1, 2]
    writer.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    with pytest.raises(ZeroDivisionError):
        writer.check()


SLOW = """
import sys, time
from infra.config import Home
from pipelines import checkpoints
from pipelines.train import train
from pipelines.train_config import KeepConfig
from tests.pipelines.ranks import config
put = checkpoints._put
def slow(path, write):  # a disk that takes an hour for the second half of the training
    digest = put(path, write)
    time.sleep(3600 if "step-000000004" in str(path) else 0)
    return digest
checkpoints._put = slow
train(config(Home(sys.argv[1]), name="slow", steps=12, keep=KeepConfig(to=sys.argv[2] or None)))
"""


def test_killed_while_a_checkpoint_is_on_its_way_the_one_before_is_used_bit_by_bit(place, target):
    whole, slow = (config(place, name=n, steps=12, keep=KeepConfig(to=target)) for n in ("whole", "slow"))
    train(whole)
    job = plan_job(slow)
    driver = subprocess.Popen([sys.executable, "-c", SLOW, str(place.path), target or ""])
    journal, end = job.folder / "progress.jsonl", time.monotonic() + 300
    while not (journal.exists() and '"step": 5' in journal.read_text()):  # a step beyond the one that is being saved
        assert driver.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    train(slow)
    starts = [json.loads(line)["at"] for line in journal.read_text().splitlines() if '"pid"' in line]
    assert starts == [0, 2]
    assert losses(job.folder) == losses(plan_job(whole).folder)


FULL = """
import shutil
from dataclasses import replace
from pathlib import Path
from infra.config import Home, UserError
from pipelines.jobs import plan_job
from pipelines.train import train
from pipelines.train_config import KeepConfig
from tests.pipelines.ranks import config, losses
disk, home = Path(DISK), Home(HOME)
for background in (True, False):
    for folder in disk.iterdir():
        shutil.rmtree(folder)
    full = config(home, name=f"full{int(background)}", keep=KeepConfig(to=str(disk), background=background))
    remount("500k")
    try:
        train(full)
    except UserError as error:
        print(error)
    remount("64m")
    train(full)
    whole = config(home, name="whole")
    train(whole)
    folder = plan_job(full).folder
    told = (folder / "progress.jsonl").read_text()
    print(losses(folder) == losses(plan_job(whole).folder), "continued at step 2" in told)
"""


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(place, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = on_small_disk(disk, FULL.replace("DISK", repr(str(disk))).replace("HOME", repr(str(place.path))), "500k")
    said = made.stdout.splitlines()
    assert len(said) == 4, made.stdout + made.stderr
    for n in (0, 2):
        assert f"no room for the checkpoint of step 4 in {disk}" in said[n]
        assert "the ones before are kept, free some space and give the same command again" in said[n]
        assert said[n + 1] == "True True"


def test_what_is_saved_in_the_background_is_what_is_saved_at_once(place):
    found = []
    for background in (True, False):
        settings = config(place, name=f"copy{int(background)}", keep=KeepConfig(background=background))
        train(settings)
        found.append(Checkpoints(plan_job(settings).folder, settings.keep).choose()[0][1])
    assert found[0] == found[1]
