"""One video, in a process of its own: decoded once, measured, cut into clips, within limits of time and memory.

A decoder may crash, hang or eat memory on a bad file. So a worker never decodes: it feeds videos to a `Child`, and what
kills the child becomes the video's ledger row.

    python -m pipelines.unit        # the child: jobs on stdin, results on stdout; msgpack, since it reads foreign files
"""

import contextlib
import hashlib
import logging
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import cv2
import msgpack
import numpy as np

from infra.config import from_dict
from pipelines.config import CurateConfig
from pipelines.filters import judge, measure, phash
from pipelines.video import Sampler, Tally, VideoError, encode_clip, strip

log = logging.getLogger(__name__)

THUMBS = 8
THUMB_PX = 48
ALARM_GRACE_S = 10
ORPHAN_FACTOR = 20  # a hung child whose worker was killed ends itself after so many limits
RETRIES = 1  # a child may die of what happens around it (the kernel's OOM killer); twice is the video's own doing


@dataclass
class Cutter:
    """Cuts the slots of one video into windows, measures each, and encodes those that pass."""

    config: CurateConfig
    job: dict[str, Any]
    digest: str

    def run(self, sampler: Sampler) -> dict[str, Any]:
        """The whole video: its ledger fields, and its clips' rows."""
        size = self.config.clip_frames
        clips: list[dict[str, Any]] = []
        windows: list[dict[str, Any]] = []
        thumbs: list[np.ndarray] = []
        content = hashlib.sha256()
        buffer = np.empty((size, self.config.height_px, self.config.width_px, 3), np.uint8)
        held, gap_s, slots = 0, 0.0, 0
        met = Tally()
        for slot in sampler.slots():
            at = slot.index % size
            if at == 0:
                held, gap_s = 0, 0.0
            buffer[at] = slot.frame
            content.update(slot.frame.data)
            held, gap_s, slots = held + slot.held, max(gap_s, slot.gap_s), slots + 1
            if at in (0, size // 2):
                thumbs.append(thumb(slot.frame))
            if at == size - 1:
                facts = {"held_share": held / size, "max_gap_ms": round(gap_s * 1000)}
                facts["corrupt_share"] = _corrupt_share(sampler.tally, met)
                met = replace(sampler.tally)
                window, clip = self._window(slot.index - at, buffer, facts, sampler)
                windows.append(window)
                clips += [clip] if clip else []
        return {
            **outcome_of(windows, slots / self.config.fps, sampler.tally.stopped),
            **_source(sampler),
            "frames_digest": content.hexdigest(),
            "duration_s": slots / self.config.fps,
            "corrupt_share": _corrupt_share(sampler.tally, Tally()),
            "windows": windows,
            "preview": strip(_evenly(thumbs)),
            "rows": clips,
        }

    def _window(
        self, first: int, frames: np.ndarray, facts: dict[str, Any], sampler: Sampler
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        fps, size = self.config.fps, len(frames)
        cuts = {sampler.slot_of(c) - first for c in sampler.tally.cuts_s}
        signals = {**facts, **measure(frames), "cut_frames": sorted(c for c in cuts if 0 < c < size)}
        start_s = first / fps
        reason = judge(signals, self.config.filters)
        clip_id = hashlib.sha256(f"{self.digest}/{self.job['content']}/{first}".encode()).hexdigest()[:24]
        stored = clip_id in self.job["have"]
        window = {"start_s": start_s, "clip_id": clip_id, "reason": reason, "preview": None, **signals}
        if reason:
            window["clip_id"] = clip_id if stored else None
            window["preview"] = strip(_evenly([thumb(f) for f in frames[:: max(1, size // THUMBS)]]))
        if reason or stored:
            return window, None
        clip = {
            "clip_id": clip_id,
            "start_s": start_s,
            "fps": fps,
            "n_frames": size,
            "width_px": frames.shape[2],
            "height_px": frames.shape[1],
            "codec": self.config.codec,
            "video": encode_clip(frames, fps=fps, codec=self.config.codec, crf=self.config.crf),
            **signals,
            **_source(sampler),
            "phash": phash(frames, fps).tolist(),
            "actions": _actions(Path(self.job["path"]), start_s, fps, size),
        }
        return window, clip


def _source(sampler: Sampler) -> dict[str, Any]:
    probe = sampler.probe
    return {
        "source_codec": probe.codec,
        "source_fps": probe.fps,
        "source_width_px": probe.width_px,
        "source_height_px": probe.height_px,
    }


def _corrupt_share(now: Tally, before: Tally) -> float:
    """Share of source frames that were damaged or lost since an earlier tally."""
    damaged, whole = now.corrupt - before.corrupt, now.frames - before.frames
    return min(1.0, damaged / max(1, whole))


def outcome_of(windows: list[dict[str, Any]], seconds: float, stopped: str) -> dict[str, Any]:
    """A video's outcome, stage, reason and detail for the ledger, from its windows' reasons.

    Args:
        windows: with "reason" each.
        seconds: of video decoded.
        stopped: what ended decoding early, if anything did.
    """
    reasons = [w["reason"] for w in windows if w["reason"]]
    kept = len(windows) - len(reasons)
    if not windows:
        return {"outcome": "rejected", "stage": "cut", "reason": "too_short", "detail": f"{seconds:.1f} s decoded"}
    worst = max(sorted(set(reasons)), key=reasons.count, default="")
    detail = ", ".join(f"{r} {reasons.count(r)}" for r in sorted(set(reasons)))
    if not kept:
        return {"outcome": "rejected", "stage": "filter", "reason": worst, "detail": detail}
    if stopped:
        return {"outcome": "partial", "stage": "decode", "reason": worst or "damaged", "detail": stopped}
    return {"outcome": "partial" if reasons else "kept", "stage": "filter", "reason": worst, "detail": detail}


def _actions(video: Path, start_s: float, fps: int, count: int) -> list[int] | None:
    """The simulator's true action in force in each slot, where it left them beside the video."""
    path = video.with_suffix(".actions.npz")
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as data:
        times_s, action = data["times_s"], data["action"]
    at = np.searchsorted(times_s, start_s + np.arange(count) / fps + 1e-6, side="right") - 1
    return action[np.clip(at, 0, len(action) - 1)].astype(int).tolist()


def thumb(frame: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) scaled to the contact sheet's height."""
    width = max(1, round(frame.shape[1] * THUMB_PX / frame.shape[0]))
    return cv2.resize(frame, (width, THUMB_PX), interpolation=cv2.INTER_AREA)


def _evenly(items: list[np.ndarray]) -> list[np.ndarray]:
    if len(items) <= THUMBS:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, THUMBS)]


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


def curate_video(job: dict[str, Any], config: CurateConfig, digest: str) -> dict[str, Any]:
    """One video from file to clips; a file that can't be used becomes a dead letter with its reason."""
    path = Path(job["path"])
    if job["verdict"]:
        return {"preview": peek(path, config) if job["peek"] else None, "rows": []}
    try:
        job = {**job, "content": file_digest(path)}
        sampler = Sampler(
            path, fps=config.fps, width_px=config.width_px, height_px=config.height_px, aspect=config.aspect
        )
        return {"content_digest": job["content"], **Cutter(config, job, digest).run(sampler)}
    except VideoError as error:
        return {**dead_letter("decode", error.reason, error.detail), "content_digest": job["content"]}
    except MemoryError as error:
        return dead_letter("decode", "memory", str(error) or f"over {config.memory_bytes} bytes")
    except FileNotFoundError as error:
        return dead_letter("read", "missing", f"{error.filename} was there when the run was planned")


def dead_letter(stage: str, reason: str, detail: str) -> dict[str, Any]:
    """Ledger fields of a video that could not be processed."""
    return {"outcome": "dead_letter", "stage": stage, "reason": reason, "detail": detail[:300], "rows": []}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- the child ---------------------------------------------------------------------------------------------------


class Child:
    """A process that lives across videos and is replaced when one kills it; starting one takes about 0.4 s."""

    def __init__(self, config: dict[str, Any], digest: str) -> None:
        self.settings = {"config": config, "digest": digest}
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """The result of a job, or a dead letter: `timeout`, `crash` (with the signal's name)."""
        died = ""
        for _ in range(RETRIES + 1):
            process = self._started()
            stdin, stdout = _pipes(process)
            try:
                _send(stdin, {"job": job, "limit_s": limit_s})
                if not _answers(process, stdout, limit_s):
                    self.stop()
                    return dead_letter("decode", "timeout", f"no result within {limit_s:.0f} s")
                return _receive(stdout)
            except (EOFError, BrokenPipeError):
                died = _cause(process)
                self.stop()
        return dead_letter("decode", "crash", died)

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "pipelines.unit"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stdin, _ = _pipes(self.process)
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


def _cause(process: subprocess.Popen[bytes]) -> str:
    code = process.wait(timeout=ALARM_GRACE_S)
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
            result = curate_video(message["job"], config, settings["digest"])
            signal.alarm(0)
            result["seconds"] = time.process_time() - began
            _send(results, result)


def _limit_memory(extra_bytes: int) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
