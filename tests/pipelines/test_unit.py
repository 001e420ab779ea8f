import os
import signal
import threading
import time

import numpy as np
import pytest

from infra.config import to_dict
from pipelines.unit import Child, curate_video
from tests.pipelines.footage import film, film_as, scroll, settings


def curated(path, config):
    """Result and rows of one video, in this process."""
    rows = []
    return {**curate_video(job(path), config, "x", rows.append), "rows": rows}


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


def test_a_crash_is_tried_again_once(tmp_path, child):
    os.mkfifo(tmp_path / "endless.mp4")
    killed = []

    def strike():
        for _ in range(2):
            writer = reader_came(tmp_path / "endless.mp4")
            killed.append(child.process.pid)
            os.kill(child.process.pid, signal.SIGSEGV)
            time.sleep(0.2)
            os.close(writer)

    thread = threading.Thread(target=strike)
    thread.start()
    result = child.run(job(tmp_path / "endless.mp4"), 60)
    thread.join()
    assert (result["outcome"], result["reason"]) == ("dead_letter", "crash")
    assert "SIGSEGV" in result["detail"]
    assert len(set(killed)) == 2
    assert child.run(job(film(tmp_path, "v", scroll(90))), 60)["outcome"] == "kept"


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
