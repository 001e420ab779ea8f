"""One video, in a process of its own: decoded once, measured, cut into clips, within limits of time and memory.

A decoder may crash, hang or eat memory on a bad file. So a worker never decodes: it feeds videos to a `Child`, and what
kills the child becomes the video's ledger row.

    python -m pipelines.unit        # the child: jobs on stdin, results on stdout; msgpack, since it reads foreign files
"""

import contextlib
import errno
import hashlib
import logging
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import cv2
import msgpack
import numpy as np

from infra.config import from_dict
from pipelines.config import CurateConfig
from pipelines.cutter import THUMBS, Cutter, thumb
from pipelines.sampling import Sampler, find_bars
from pipelines.video import VideoError, strip

log = logging.getLogger(__name__)

ALARM_GRACE_S = 10
ORPHAN_FACTOR = 20  # a hung child whose worker was killed ends itself after so many limits
OWN_DEATHS = 2  # a crash may come from what the last video left behind; a second one in a fresh child is this video's
OUTSIDE = (signal.SIGKILL, signal.SIGTERM)  # from the kernel's OOM killer or a scheduler: they say little of the video
DEATHS = 5  # of any kind


def peek(path: Path, config: CurateConfig) -> bytes:
    """A contact strip from the first seconds of a video that nobody decodes otherwise; empty if it can't be read."""
    with contextlib.suppress(VideoError):
        sampler = Sampler(path, fps=1, width_px=config.width_px, height_px=config.height_px, aspect=config.aspect)
        frames: list[np.ndarray] = []
        for slot in sampler.slots():
            frames.append(thumb(slot.frame))
            if len(frames) == THUMBS:
                break
        return strip(frames)
    return b""


def curate_video(
    job: dict[str, Any], config: CurateConfig, digest: str, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """One video from file to clips; a file that can't be used becomes a dead letter with its reason.

    Args:
        job: "path", "verdict" and "peek" of the plan, "have" (ids of clips that are stored already),
            and for a part of a video "first_slot" and "last_slot".
        config: the settings.
        digest: of those that a clip's bytes depend on.
        keep: takes each clip's row.

    Returns:
        The ledger's fields.
    """
    path = Path(job["path"])
    if job["verdict"]:
        return {"preview": peek(path, config) if job["peek"] else None}
    try:
        job = {**job, "content": file_digest(path)}
        sampler = Sampler(
            path,
            fps=config.fps,
            width_px=config.width_px,
            height_px=config.height_px,
            aspect=config.aspect,
            bars_px=find_bars(path) if config.crop_bars else (0, 0),
        )
        return {"content_digest": job["content"], **Cutter(config, job, digest, keep).run(sampler)}
    except VideoError as error:
        return {**dead_letter("decode", error.reason, error.detail), "content_digest": job["content"]}
    except MemoryError as error:
        return dead_letter("decode", "memory", str(error) or f"over {config.memory_bytes} bytes")
    except FileNotFoundError as error:
        return dead_letter("read", "missing", f"{error.filename} was there when the run was planned")


def dead_letter(stage: str, reason: str, detail: str) -> dict[str, Any]:
    """Ledger fields of a video that could not be processed."""
    return {"outcome": "dead_letter", "stage": stage, "reason": reason, "detail": detail[:300]}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- the child ---------------------------------------------------------------------------------------------------


class Child:
    """A process that lives across videos and is replaced when one kills it; starting one takes about 0.4 s.

    It leaves clips in a file, so that neither side holds more than one of them; the file has no name and goes with us.
    """

    def __init__(self, config: dict[str, Any], digest: str) -> None:
        self.settings = {"config": config, "digest": digest}
        self.process: subprocess.Popen[bytes] | None = None
        self.clips = cast(IO[bytes], tempfile.TemporaryFile(buffering=0))  # noqa: SIM115 - unbuffered, as another writes

    def run(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The result of a job with its clips' "rows" (to be read once, before the next job), or a dead letter:
        `timeout`, `crash` (with the signal's name).

        Raises:
            OSError: no room for the clips.
        """
        result = self._result(job, limit_s)
        if "no_room" in result:
            raise OSError(result["no_room"], f"no room for clips in {tempfile.gettempdir()}")
        return {**result, "rows": self._rows() if result.get("windows") else []}

    def _rows(self) -> Iterator[dict[str, Any]]:
        self.clips.seek(0)
        with contextlib.suppress(EOFError):
            while True:
                yield _receive(self.clips)

    def _result(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        deaths: list[int] = []
        while sum(-d not in OUTSIDE for d in deaths) < OWN_DEATHS and len(deaths) < DEATHS:
            process = self._started()
            stdin, stdout = _pipes(process)
            try:
                clips = f"/proc/{os.getpid()}/fd/{self.clips.fileno()}"
                _send(stdin, {"job": job, "limit_s": limit_s, "clips": clips})
                if not _answers(process, stdout, limit_s):
                    self.stop()
                    return dead_letter("decode", "timeout", f"no result within {limit_s:.0f} s")
                return _receive(stdout)
            except (EOFError, BrokenPipeError):
                deaths.append(process.wait(timeout=ALARM_GRACE_S))
                self.stop()
        return dead_letter("decode", "crash", _cause(min(deaths, key=lambda d: -d in OUTSIDE)))

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "pipelines.unit"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stdin, _ = _pipes(self.process)
            with contextlib.suppress(BrokenPipeError):  # dead already: the job will find out
                _send(stdin, self.settings)
        return self.process

    def stop(self) -> None:
        """Kills the child, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None


def _send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """One message: its length (8 bytes), then msgpack."""
    data = cast(bytes, msgpack.packb(message, default=np.generic.item))  # NumPy's scalars as Python's
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> dict[str, Any]:
    """The next message.

    Raises:
        EOFError: the other side ended before a whole one.
    """
    head = stream.read(8)
    data = stream.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
    if not data or len(data) < struct.unpack("<Q", head)[0]:
        raise EOFError
    return msgpack.unpackb(data)


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the child was started without pipes")
    return process.stdin, process.stdout


def _answers(process: subprocess.Popen[bytes], stdout: IO[bytes], limit_s: float) -> bool:
    """Waits for a result; false after `limit_s` of CPU time, or of no CPU time at all.

    The clock on the wall would make dead letters of good videos on a busy machine.
    """
    began = used = _cpu_s(process.pid)
    moved = time.monotonic()
    while not select.select([stdout], [], [], min(1.0, limit_s / 4))[0]:
        now = _cpu_s(process.pid)
        if now != used:
            used, moved = now, time.monotonic()
        if used - began > limit_s or time.monotonic() - moved > limit_s:
            return False
    return True


def _cpu_s(pid: int) -> float:
    """CPU seconds a process has used (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _cause(code: int) -> str:
    if code < 0:
        return f"the decoder was killed by {signal.Signals(-code).name}"
    return f"the decoder ended with status {code}"


def main() -> None:
    """Serves jobs until stdin ends; the alarm ends a hung one even if nobody is left to kill it."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print must not speak into the results
    cv2.setNumThreads(1)
    with contextlib.suppress(EOFError):
        settings = _receive(sys.stdin.buffer)
        config = from_dict(CurateConfig, settings["config"])
        _limit_memory(config.memory_bytes)
        while True:
            message = _receive(sys.stdin.buffer)
            signal.alarm(int(ORPHAN_FACTOR * message["limit_s"]) + ALARM_GRACE_S)
            began = time.process_time()
            result = _served(message, config, settings["digest"])
            signal.alarm(0)
            result["seconds"] = time.process_time() - began
            _send(results, result)


def _served(message: dict[str, Any], config: CurateConfig, digest: str) -> dict[str, Any]:
    try:
        with Path(message["clips"]).open("wb") as clips:
            return curate_video(message["job"], config, digest, lambda row: _send(clips, row))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        return {"no_room": error.errno}


def _limit_memory(extra_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
