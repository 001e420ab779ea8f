import errno
import os
import subprocess
import sys
import time

import pytest

from pipelines.config import FetchConfig
from pipelines.fetch import FetchError, fetched, read_small, retried
from tests.pipelines.remote import Web, on_small_disk

DATA = os.urandom(300_000)


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "v \u00fc.mp4").write_bytes(DATA)
    with Web(tmp_path / "web") as server:
        yield server


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("pipelines.fetch.FIRST_PAUSE_S", 0.01)


def policy(tmp_path, **changes):
    return FetchConfig(**{"scratch": tmp_path / "scratch", "retries": 3, **changes})


def leftovers(tmp_path):
    return [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]


def test_a_file_that_is_here_is_not_copied(tmp_path):
    with fetched(str(tmp_path / "v.mp4"), None, policy(tmp_path)) as got:
        assert got.path == tmp_path / "v.mp4"
    assert not (tmp_path / "scratch").exists()


def test_a_web_video_is_here_for_the_time_of_the_block(web, tmp_path):
    with fetched(f"{web.url}/v%20%C3%BC.mp4?sig=a/b.c", len(DATA), policy(tmp_path)) as got:
        assert got.path.read_bytes() == DATA
        assert got.path.suffix == ".mp4"
    assert not leftovers(tmp_path)


def test_a_bucket_video_comes_with_its_actions(bucket, tmp_path):
    from pipelines.buckets import place

    uri, options = bucket
    place(f"{uri}/a/v.mp4{options}").write_bytes(DATA)
    place(f"{uri}/a/v.actions.npz{options}").write_bytes(b"actions")
    with fetched(f"{uri}/a/v.mp4{options}", len(DATA), policy(tmp_path)) as got:
        assert got.path.read_bytes() == DATA
        assert got.path.with_suffix(".actions.npz").read_bytes() == b"actions"
    with pytest.raises(FetchError) as caught, fetched(f"{uri}/a/w.mp4{options}", None, policy(tmp_path)):
        pass
    assert caught.value.reason == "not_found"


@pytest.mark.parametrize("troubles", [[503], [500, 429, 502], ["cut", 503, "cut"]])
def test_errors_that_pass_are_waited_out(web, tmp_path, quick, troubles):
    web.troubles["/v \u00fc.mp4"] = list(troubles)
    with fetched(f"{web.url}/v%20%C3%BC.mp4", len(DATA), policy(tmp_path)) as got:
        assert got.path.read_bytes() == DATA
        assert got.retries == len(troubles)


@pytest.mark.parametrize(
    ("status", "reason", "asked"),
    [(403, "forbidden", 1), (401, "forbidden", 1), (404, "not_found", 1), (418, "refused", 1), (503, "unreachable", 4)],
)
def test_only_errors_that_pass_are_tried_again(web, tmp_path, quick, status, reason, asked):
    web.troubles["/v \u00fc.mp4"] = [status] * 9
    with pytest.raises(FetchError) as caught, fetched(f"{web.url}/v%20%C3%BC.mp4", None, policy(tmp_path)):
        pass
    assert (caught.value.reason, len(web.asked)) == (reason, asked)
    assert str(status) in caught.value.detail
    assert ("(4 tries)" in caught.value.detail) == (asked == 4)


@pytest.mark.parametrize(
    ("changes", "size", "reason"),
    [({"max_bytes": 1000}, None, "too_large"), ({}, len(DATA) + 1, "changed"), ({"timeout_s": 1.0}, None, "slow")],
)
def test_limits_of_size_and_time(web, tmp_path, changes, size, reason):
    if reason == "slow":
        web.troubles["/v \u00fc.mp4"] = ["stall"]
    began = time.monotonic()
    with pytest.raises(FetchError) as caught, fetched(f"{web.url}/v%20%C3%BC.mp4", size, policy(tmp_path, **changes)):
        pass
    assert caught.value.reason == reason
    assert time.monotonic() - began < 60
    assert not leftovers(tmp_path)


def test_nobody_listens(tmp_path, quick):
    for uri in ("http://127.0.0.1:9/v.mp4", "s3://b/v.mp4?endpoint_override=127.0.0.1:9&scheme=http"):
        with pytest.raises(FetchError) as caught, fetched(uri, None, policy(tmp_path, retries=0)):
            pass
        assert (caught.value.reason, caught.value.passing) == ("unreachable", True)


def test_pauses_grow_and_differ(monkeypatch):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)

    def fail():
        raise ConnectionError("busy")

    with pytest.raises(FetchError, match="busy .11 tries"):
        retried(fail, FetchConfig(retries=10))
    assert pauses[-1] > 10 * pauses[0]
    assert max(pauses) <= 30
    assert len(set(pauses)) == len(pauses)


def test_a_full_disk_is_not_the_videos_fault(web, tmp_path):
    """A real one: a file system of 64 kB, in a mount namespace of its own."""
    script = f"""
from pipelines.config import FetchConfig
from pipelines.fetch import fetched
from pathlib import Path
try:
    with fetched("{web.url}/v%20%C3%BC.mp4", None, FetchConfig(scratch=Path("{tmp_path}/small"))):
        print("fetched")
except OSError as error:
    print(error.errno, error)
"""
    (tmp_path / "small").mkdir()
    done = on_small_disk(tmp_path / "small", script)
    assert done.stdout.startswith(f"{errno.ENOSPC} "), done.stdout + done.stderr
    assert "No space left" in done.stdout
    assert len(web.asked) == 1


def test_what_killed_workers_left_is_cleared(web, tmp_path):
    root = tmp_path / "scratch" / f"lampworks-fetch-{os.getuid()}"
    (root / "999999999-x").mkdir(parents=True)
    (root / "999999999-x" / "half.mp4").write_bytes(b"x")
    (root / f"{os.getpid()}-y").mkdir()
    with fetched(f"{web.url}/v%20%C3%BC.mp4", None, policy(tmp_path)):
        pass
    assert [p.name for p in root.iterdir()] == [f"{os.getpid()}-y"]


def test_workers_on_parts_of_one_video_share_its_copy(web, tmp_path):
    """Five processes want the file at the same time, a sixth while one of them holds it: it crosses the wire once."""
    (tmp_path / "web" / "large.mp4").write_bytes(DATA * 100)
    script = f"""
import sys
from pathlib import Path
from pipelines.config import FetchConfig
from pipelines.fetch import fetched
with fetched("{web.url}/large.mp4", None, FetchConfig(scratch=Path({str(tmp_path / "scratch")!r})), shared=True) as got:
    print(got.path.stat().st_size, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(5)]
    assert [int(worker.stdout.readline()) for worker in workers] == [len(DATA) * 100] * 5
    for worker in workers[:4]:
        worker.communicate()
    last = subprocess.run(command, input="", capture_output=True, text=True, timeout=60)
    assert int(last.stdout) == len(DATA) * 100
    workers[4].communicate()
    assert web.asked == [("GET", "/large.mp4")]
    assert [p for p in leftovers(tmp_path) if not p.name.startswith("lock-")] == []
    with fetched(f"{web.url}/large.mp4", None, policy(tmp_path), shared=True):
        assert len(web.asked) == 2, "nobody held it any more"


def test_small_files_are_read_whole(web, tmp_path, monkeypatch):
    (tmp_path / "web" / "a.info.json").write_text("{}")
    assert read_small(f"{web.url}/a.info.json") == b"{}"
    monkeypatch.setattr("pipelines.fetch.SMALL_BYTES", 1000)
    with pytest.raises(FetchError, match="too_large"):
        read_small(f"{web.url}/v%20%C3%BC.mp4")


def test_memory_does_not_grow_with_the_file(web, bucket, tmp_path):
    """Of a process of its own, after a small file: what 60 MB more add to its peak."""
    from pipelines.buckets import place

    uri, options = bucket
    with (tmp_path / "web" / "large.mp4").open("wb") as file:
        file.truncate(60 << 20)
    place(f"{uri}/large.mp4{options}").upload(tmp_path / "web" / "large.mp4")
    place(f"{uri}/small.mp4{options}").write_bytes(DATA)
    script = f"""
import resource
from pathlib import Path
from pipelines.config import FetchConfig
from pipelines.fetch import fetched
policy = FetchConfig(scratch=Path({str(tmp_path)!r}))
def peak(*locations):
    for location in locations:
        with fetched(location, None, policy) as got:
            print(got.path.stat().st_size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak("{web.url}/v%20%C3%BC.mp4", "{uri}/small.mp4{options}")
print(peak("{web.url}/large.mp4", "{uri}/large.mp4{options}") - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    sizes = [int(line) for line in done.stdout.split()]
    assert sizes[:4] == [len(DATA)] * 2 + [60 << 20] * 2, done.stderr
    assert sizes[4] < 30 << 10  # kB
