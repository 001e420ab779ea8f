import os
import signal
import threading
import time
from fractions import Fraction

import numpy as np
import pytest

from infra.config import to_dict
from pipelines.sampling import Sampler
from pipelines.unit import Child, curate_video
from tests.pipelines.footage import film, film_as, scroll, settings


def curated(path, config, **changes):
    """Result and rows of one video, in this process."""
    rows = []
    return {**curate_video(job(path, **changes), config, "x", rows.append), "rows": rows}


def job(path, **changes):
    return {"path": str(path), "verdict": False, "peek": False, "have": [], **changes}


@pytest.fixture
def child(tmp_path):
    made = Child(to_dict(settings(tmp_path, tmp_path)), "x")
    yield made
    made.stop()


def test_a_child_does_what_the_function_does(tmp_path, child):
    path = film(tmp_path, "v", scroll(90))
    result, direct = child.run(job(path), 60), curated(path, settings(tmp_path, tmp_path))
    result["rows"] = list(result["rows"])
    assert {k: v for k, v in result.items() if k != "seconds"} == direct
    assert result["seconds"] > 0
    first = child.process.pid
    child.run(job(path), 60)
    assert child.process.pid == first  # it lives across videos: starting one is dear


def test_a_hang_becomes_a_dead_letter_and_the_next_video_is_fine(tmp_path, child):
    os.mkfifo(tmp_path / "endless.mp4")  # opening it waits for a writer who never comes
    began = time.monotonic()
    result = child.run(job(tmp_path / "endless.mp4"), 1.0)
    assert (result["outcome"], result["reason"]) == ("dead_letter", "timeout")
    assert time.monotonic() - began < 30
    assert child.run(job(film(tmp_path, "v", scroll(90))), 60)["outcome"] == "kept"


@pytest.mark.parametrize(
    ("blows", "cause"),
    [
        ([signal.SIGSEGV] * 2, "SIGSEGV"),
        ([signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGSEGV], "SIGSEGV"),
        ([signal.SIGKILL] * 5, "SIGKILL"),
    ],
)
def test_a_crash_is_tried_again_once_and_a_kill_from_outside_more_often(tmp_path, child, blows, cause):
    killed = beaten(tmp_path / "endless.mp4", child, blows)
    result = child.run(job(tmp_path / "endless.mp4"), 60)
    assert (result["outcome"], result["reason"]) == ("dead_letter", "crash")
    assert cause in result["detail"]
    assert len(set(killed)) == len(blows)
    assert child.run(job(film(tmp_path, "v", scroll(90))), 60)["outcome"] == "kept"


def test_a_good_video_outlives_kills_from_outside(tmp_path, child):
    path = film(tmp_path, "v", scroll(90))
    want = list(child.run(job(path), 60)["rows"])
    child.stop()
    killed = beaten(tmp_path / "endless.mp4", child, [signal.SIGKILL] * 3, then=path)
    assert list(child.run(job(tmp_path / "endless.mp4"), 60)["rows"]) == want
    assert len(set(killed)) == 3


def beaten(pipe, child, blows, then=None):
    """Kills a child each time it begins to read a file; puts a good video in the file's place in the end.

    Returns:
        The process ids that were killed, complete when the child's job is done.
    """
    os.mkfifo(pipe)
    killed = []

    def strike():
        for blow in blows:
            writer = reader_came(pipe)
            killed.append(child.process.pid)
            if then is not None and len(killed) == len(blows):
                then.rename(pipe)
            os.kill(killed[-1], blow)
            time.sleep(0.2)
            os.close(writer)

    threading.Thread(target=strike).start()
    return killed


def reader_came(pipe):
    """Opens a named pipe for writing as soon as somebody waits to read from it."""
    for _ in range(3000):
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.02)
    raise TimeoutError(f"nobody reads {pipe}")


def test_a_memory_hog_becomes_a_dead_letter(tmp_path):
    huge = np.repeat(np.repeat(scroll(4), 40, axis=1), 40, axis=2)
    path = film_as(tmp_path / "huge.mkv", huge, codec="ffv1", pixels="yuv444p")
    child = Child(to_dict(settings(tmp_path, tmp_path, memory_bytes=24 * 2**20)), "x")
    result = child.run(job(path), 60)
    child.stop()
    assert result["outcome"] == "dead_letter"
    assert result["reason"] in ("memory", "undecodable", "unreadable")
    child = Child(to_dict(settings(tmp_path, tmp_path)), "x")
    assert child.run(job(path), 60)["reason"] == "too_short"
    child.stop()


def test_true_actions_are_carried_along(tmp_path):
    path = film(tmp_path, "v", scroll(90), fps=20)
    actions = np.arange(90) // 2
    np.savez(path.with_suffix(".actions.npz"), times_s=np.arange(90) / 20, action=actions)
    rows = curated(path, settings(tmp_path, tmp_path))["rows"]
    assert [row["actions"] for row in rows] == [list(range(20)), list(range(20, 40))]
    path.with_suffix(".actions.npz").unlink()
    assert curated(path, settings(tmp_path, tmp_path))["rows"][0]["actions"] is None


def test_a_file_that_went_away_is_a_dead_letter(tmp_path, child):
    result = child.run(job(tmp_path / "gone.mp4"), 60)
    assert (result["outcome"], result["stage"], result["reason"]) == ("dead_letter", "read", "missing")


def test_cuts_are_stored_for_the_window_sampler(tmp_path):
    path = film(tmp_path, "v", np.concatenate([scroll(50, seed=1), scroll(40, seed=2)]), fps=20)
    rows = curated(path, settings(tmp_path, tmp_path))["rows"]
    assert [row["cut_frames"] for row in rows] == [[], [5]]  # 2.5 s is frame 5 of the clip that starts at 2.0 s


LONGS = {
    "long.mp4": {"g": "25", "bf": "3"},
    "open_gop.mkv": {"g": "30", "x264-params": "open-gop=1:bframes=3:b-adapt=0"},
    "no_index.ts": {"g": "12", "codec": "mpeg2video", "fps": Fraction(25)},
    "hevc.mkv": {"codec": "libx265", "x265-params": "log-level=0:keyint=40"},
    "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "g": "50"},
    "mpeg4.avi": {"codec": "mpeg4", "g": "30"},
    "uneven.mkv": {"times_s": [n / 20 + 0.02 * (n % 2) + 4.1 * (n > 301) for n in range(600)], "g": "20", "bf": "0"},
}


@pytest.mark.parametrize("name", LONGS)
def test_a_video_in_parts_gives_the_same_clips(tmp_path, name):
    """Windows, signals and bytes are equal wherever decoding began: content digests and previews are the part's own."""
    changes = {"speed": 3, "cut_every": 97}
    path = film_as(tmp_path / name, np.concatenate([scroll(300, seed=n, **changes) for n in (1, 2)]), **LONGS[name])
    config = settings(tmp_path, tmp_path)
    whole = curated(path, config)
    size = 3 * config.clip_frames
    firsts = range(0, round(whole["duration_s"] * config.fps), size)
    parts = [
        curated(path, config, first_slot=first, last_slot=None if first == firsts[-1] else first + size - 1)
        for first in firsts
    ]
    assert len(parts) > 3 and len(whole["windows"]) > 11
    assert [w for part in parts for w in part["windows"]] == whole["windows"]
    assert [row for part in parts for row in part["rows"]] == whole["rows"]
    assert sum(part["duration_s"] for part in parts) == pytest.approx(whole["duration_s"])


def test_a_part_reads_little_of_a_long_file(tmp_path):
    path = film_as(tmp_path / "v.mp4", np.concatenate([scroll(400, seed=n) for n in range(3)]), g="20")
    config = settings(tmp_path, tmp_path)
    sampler = Sampler(path, fps=10, width_px=32, height_px=32, aspect="pad")
    last = [slot.index for slot in sampler.slots(560)]
    assert last == list(range(560, 600))
    assert sampler.tally.frames < 150
    assert curated(path, config, first_slot=10_000)["reason"] == "too_short"  # beyond the end: the sidecar was wrong
