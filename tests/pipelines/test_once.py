"""Exactly once: killed anywhere and run again until it ends, a curation gives what an undisturbed one gives."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import ray

from pipelines.buckets import place
from pipelines.shards import open_dataset
from tests.pipelines.footage import corpus, film, scroll, sidecar
from tests.pipelines.remote import make_bucket, upload

HERE = Path(__file__).parent
DRIVER = """
    import logging, sys
    from pathlib import Path
    from infra import cluster
    from infra.config import ClusterConfig
    from pipelines.curate import curate
    from tests.pipelines.footage import settings
    cluster.WORKER_ENVIRONMENT["PYTHONPATH"] = ""
    logging.basicConfig(level=logging.INFO)
    home, source, target, address = sys.argv[1:]
    limits = dict(timeout_s=10.0, timeout_factor=0.0, memory_bytes=600 << 20, part_s=6.0)
    curate(settings(Path(home), source, target=target or None, cluster=ClusterConfig(address=address), **limits))
"""
OUTCOMES = {
    "segv": ("dead_letter", "crash", "the decoder was killed by SIGSEGV"),
    "hang": ("dead_letter", "timeout", "no result within 10 s"),
    "hog": ("dead_letter", "memory", None),
    "text": ("dead_letter", "unreadable", None),
    "cut": ("dead_letter", "unreadable", None),
    "copy": ("kept", "", ""),
    "long#0": ("kept", "", ""),
    "long#1": ("kept", "", ""),
}
"""What becomes of the corpus's worst files; a detail of None is not looked at."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Good videos, unwanted ones, and those that crash a decoder, hang it or eat its memory."""
    folder = corpus(tmp_path_factory.mktemp("raw"))
    for name in ("segv", "hang", "hog"):
        (folder / f"{name}.mp4").write_bytes(f"FAULT {name} ".encode() * 99)
        sidecar(folder / f"{name}.mp4", duration=4.5)
    for n in range(3):
        film(folder, f"late{n}", scroll(90, seed=20 + n))
    film(folder, "long", scroll(180, seed=30))
    return folder


def start(home, source, target=""):
    """The command in a process of its own, in the cluster of the tests."""
    script = textwrap.dedent(DRIVER)
    address = ray.get_runtime_context().gcs_address
    root = HERE.parent.parent
    paths = [HERE / "faults", root, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths)))}
    words = [sys.executable, "-c", script, str(home), str(source), target, address]
    return subprocess.Popen(words, stderr=(home / "stderr").open("a"), env=environment, cwd=root)


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory, ray_cluster):
    home = tmp_path_factory.mktemp("undisturbed")
    assert start(home, source).wait() == 0, (home / "stderr").read_text()
    return open_dataset(home, "small")


def contents(dataset):
    """Everything that defines a dataset: its clips, bytes included, and every video's end."""
    clips = {row["clip_id"]: row for row in dataset.clip_table().to_pylist()}
    columns = ["video_id", "outcome", "stage", "reason", "detail", "clips", "dropped_clips", "content_digest"]
    ledger = {row["video_id"]: row for row in dataset.video_table(columns).to_pylist()}
    assert len(clips) == dataset.clip_table(["clip_id"]).num_rows
    assert len(ledger) == dataset.video_table(["video_id"]).num_rows
    return clips, ledger


# -- who is killed -----------------------------------------------------------------------------------------------


def descendants(pid):
    """Every process below one, by number."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    family = {pid}
    for _ in range(8):
        family |= {child for child, parent in parents.items() if parent in family}
    return family - {pid}


def named(word):
    """Our own processes with a word in their command lines."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            if word in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def strike(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class Killer:
    """Kills the driver once or twice, and workers and decoding children, at moments drawn from a seed."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.drivers = sorted(self.draw.randint(0, 6) for _ in range(self.draw.choice([1, 1, 2])))
        self.others = sorted(
            (self.draw.randint(0, 8), self.draw.choice(["UnitWorker", "UnitWorker", "pipelines.unit"]))
            for _ in range(self.draw.randint(1, 3))
        )
        self.killed = 0

    def watch(self, driver, done):
        """Until the driver ends. `done` tells how many units have left their files."""
        while driver.poll() is None:
            time.sleep(self.draw.uniform(0, 0.2))
            ready = done() if self.others or self.drivers else -1
            other, dies = self.others and ready >= self.others[0][0], self.drivers and ready >= self.drivers[0]
            if not (other or dies) or not named("UnitWorker"):
                continue
            if other and (victims := named(self.others[0][1])):
                strike(self.draw.choice(victims))
                self.others.pop(0)
            if dies:
                time.sleep(self.draw.uniform(0, 0.5))
                strike(driver.pid)
                self.killed += driver.wait() == -signal.SIGKILL
                self.drivers.pop(0)


def run_until_it_ends(seed, home, source, folder, target=""):
    """Runs the command again after every kill."""
    killer = Killer(seed)
    for _ in range(9):
        driver = start(home, source, target)
        killer.watch(driver, lambda: len([p for p in folder.glob("*.parquet") if not p.name.startswith(".")]))
        if driver.wait() == 0:
            assert killer.killed
            return
        assert driver.returncode == -signal.SIGKILL, (home / "stderr").read_text()[-4000:]
    raise AssertionError("it does not end")


def seeds(total, quick):
    return [*range(quick), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(quick, total))]


def test_the_worst_files_end_as_they_should(undisturbed):
    ledger = contents(undisturbed)[1]
    for name, (outcome, reason, detail) in OUTCOMES.items():
        row = ledger[name]
        assert (row["outcome"], row["reason"], detail or row["detail"]) == (outcome, reason, row["detail"])


@pytest.mark.parametrize("seed", seeds(20, 5))
def test_killed_anywhere_and_run_again_it_gives_the_same(undisturbed, source, tmp_path, seed):
    run_until_it_ends(seed, tmp_path, source, tmp_path / "datasets" / "small" / "videos")
    dataset = open_dataset(tmp_path, "small")
    assert contents(dataset) == contents(undisturbed)
    ours, theirs = dataset.clip_files(), undisturbed.clip_files()
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("seed", seeds(10, 2))
def test_the_same_from_a_bucket_to_a_bucket(undisturbed, source, tmp_path, endpoint, seed):
    uri, options = make_bucket(endpoint, f"once{seed}-{tmp_path.name[-1]}{os.getpid()}")
    there, target = upload(source, f"{uri}/raw", options), f"{uri}/sets{options}"
    folder = place(target) / "small"
    run_until_it_ends(seed, tmp_path, there, folder / "videos", target)
    dataset = open_dataset(tmp_path, str(folder))
    clips, ledger = contents(dataset)
    plain_clips, plain_ledger = contents(undisturbed)
    assert {key: row | {"unit_id": 0} for key, row in clips.items()} == {
        key: row | {"unit_id": 0} for key, row in plain_clips.items()
    }
    assert {k: v["outcome"] for k, v in ledger.items()} == {k: v["outcome"] for k, v in plain_ledger.items()}
