"""One video from where it lies to a file on this machine: within limits, again after errors that pass.

Errors that do not pass (not there, forbidden, too large, changed since the plan) are not tried again. Either way what
can't be had is a `FetchError`, which becomes the video's ledger row.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import httpx

from pipelines.buckets import file_name, is_remote, is_web, place
from pipelines.config import FetchConfig

T = TypeVar("T")

CHUNK = 4 << 20
SMALL_BYTES = 256 << 20
"""Most of a sidecar or manifest."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STALL_S = 30.0
"""A web server that says nothing for so long has failed."""
FORBIDDEN = (
    "ACCESS_DENIED",
    "SIGNATURE",
    "TOKEN",
    "INVALID_ACCESS_KEY",
    "AUTH",
    "CREDENTIAL",
    "HTTP status 40",
    "PERMISSION",
)
MISSING = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "HTTP status 404", "NOT_FOUND")
WEB_PASSING = (408, 425, 429, 500, 502, 503, 504)


class FetchError(Exception):
    """A file that can't be had: the ledger's reason and detail, whether it may go well later, tries after the first."""

    def __init__(self, reason: str, detail: str, passing: bool = False, retries: int = 0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.passing, self.retries = reason, detail, passing, retries


@dataclass
class Fetched:
    """A video on this machine.

    Attributes:
        path: the file.
        seconds: that fetching took.
        retries: how often it failed before.
    """

    path: Path
    seconds: float = 0.0
    retries: int = 0


def fault(error: Exception) -> FetchError:
    """What an I/O error means for the file: pyarrow's object stores, httpx, or this machine's file system."""
    text = str(error).replace("\n", " ")[:200]
    if isinstance(error, FetchError):
        return error
    if isinstance(error, httpx.HTTPStatusError):
        return _web_fault(error.response.status_code)
    if isinstance(error, FileNotFoundError) or any(word in text for word in MISSING):
        return FetchError("not_found", text)
    if isinstance(error, PermissionError) or any(word in text for word in FORBIDDEN):
        return FetchError("forbidden", text)
    return FetchError("unreachable", text or type(error).__name__, passing=True)


def _web_fault(status: int) -> FetchError:
    text = f"the server answers {status} {httpx.codes.get_reason_phrase(status)}"
    if status in WEB_PASSING:
        return FetchError("unreachable", text, passing=True)
    return FetchError(
        {401: "forbidden", 403: "forbidden", 404: "not_found", 410: "not_found"}.get(status, "refused"), text
    )


def retried(action: Callable[[], T], policy: FetchConfig, counted: Callable[[], None] = lambda: None) -> T:
    """The result of an action that reads; errors that pass are waited out, longer each time and never in step.

    Raises:
        FetchError: the last error, with the number of tries.
    """
    for attempt in range(policy.retries + 1):
        try:
            return action()
        except (OSError, httpx.HTTPError, FetchError) as error:
            failed = fault(error)
            if not failed.passing or attempt == policy.retries:
                tries = f" ({attempt + 1} tries)" if attempt else ""
                raise FetchError(failed.reason, failed.detail + tries, failed.passing, attempt) from error
        counted()
        time.sleep(random.uniform(0.5, 1.0) * min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt))
    raise AssertionError("unreachable: the last try returns or raises")


def head(uri: str) -> dict[str, str]:
    """A web file's headers, names in lower case."""
    answer = httpx.head(uri, follow_redirects=True, timeout=STALL_S)
    answer.raise_for_status()
    return {name.lower(): value for name, value in answer.headers.items()}


def read_small(location: str) -> bytes:
    """A sidecar or manifest, whole.

    Raises:
        FetchError: it is no such thing, judging by its size.
    """
    data = bytearray()
    with _opened(location) as (_, chunks):
        for chunk in chunks:
            data += chunk
            if len(data) > SMALL_BYTES:
                raise FetchError("too_large", f"over {SMALL_BYTES} bytes")
    return bytes(data)


@contextlib.contextmanager
def _opened(location: str) -> Iterator[tuple[int | None, Iterator[bytes]]]:
    """A file's size, where it is known, and its bytes in chunks."""
    if is_web(location):
        with httpx.stream("GET", location, follow_redirects=True, timeout=STALL_S) as answer:
            answer.raise_for_status()
            size = answer.headers.get("content-length", "")
            coded = "content-encoding" in answer.headers
            yield int(size) if size.isdigit() and not coded else None, answer.iter_bytes()
        return
    with place(location).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        yield size, iter(lambda: file.read(CHUNK), b"")


# -- videos ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fetched(location: str, size_bytes: int | None, policy: FetchConfig, shared: bool = False) -> Iterator[Fetched]:
    """The video as a file on this machine for the time of the block; one that is here already is not copied.

    Args:
        location: path or URI.
        size_bytes: as planned; another size is another video.
        policy: the limits.
        shared: take another process's copy, if one has it now or is about to (a worker on another part of the video).

    Raises:
        FetchError: it can't be had.
        OSError: this machine can't hold it.
    """
    if not is_remote(location):
        yield Fetched(Path(location))
        return
    began = time.monotonic()
    with _scratch(policy) as folder:
        name = hashlib.sha256(f"{location} {size_bytes}".encode()).hexdigest()[:32]
        got = Fetched(folder / f"{name}{Path(file_name(location)).suffix.lower()}")

        def counted() -> None:
            got.retries += 1

        def copy() -> None:
            if not (shared and _linked(got.path)):
                _copy(location, got.path, size_bytes, policy)

        try:
            with _turn(folder.parent, name) if shared else contextlib.nullcontext():
                retried(copy, policy, counted)
            if not is_web(location):
                retried(lambda: _copy_actions(place(location), got.path), policy, counted)
        except _NoRoomError as error:
            raise OSError(errno.ENOSPC, f"{error}: free space there or name another --fetch.scratch") from error
        got.seconds = time.monotonic() - began
        yield got


@contextlib.contextmanager
def _turn(root: Path, name: str) -> Iterator[None]:
    """One process at a time fetches what others may share; few locks serve all names, so that few files stay."""
    with (root / f"lock-{name[:2]}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _linked(path: Path) -> bool:
    """Whether another process had the same file whole; then it is at `path` too."""
    for twin in path.parent.parent.glob(f"*/{path.name}"):
        with contextlib.suppress(OSError):  # it goes away this moment
            path.hardlink_to(twin)
            return True
    return False


class _NoRoomError(Exception):
    """This machine can't hold a file; no trouble of the source's, so it is not tried again."""


def _copy(location: str, target: Path, planned_bytes: int | None, policy: FetchConfig) -> None:
    deadline = time.monotonic() + policy.timeout_s
    done, coming = 0, target.with_name("coming")
    with _opened(location) as (size, chunks), coming.open("wb") as file:
        _check_size(size, planned_bytes, policy)
        for chunk in chunks:
            done += len(chunk)
            _check_size(None, None, policy, done)
            if time.monotonic() > deadline:
                raise FetchError("slow", f"{done} bytes came within --fetch.timeout-s {policy.timeout_s:.0f}")
            _write(file, chunk)
    if size is not None and done != size:
        raise FetchError("unreachable", f"{done} of {size} bytes came", passing=True)
    _check_size(done, planned_bytes, policy)
    coming.rename(target)


def _check_size(size: int | None, planned_bytes: int | None, policy: FetchConfig, done: int = 0) -> None:
    if max(size or 0, done) > policy.max_bytes:
        raise FetchError("too_large", f"over --fetch.max-bytes {policy.max_bytes}")
    if size is not None and planned_bytes is not None and size != planned_bytes:
        raise FetchError("changed", f"{size} bytes, {planned_bytes} when the run was planned")


def _write(file: IO[bytes], chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise _NoRoomError(f"cannot write {file.name} ({error.strerror})") from error


def _copy_actions(video: Path, target: Path) -> None:
    """A simulator's true actions, where they lie beside the video."""
    beside = video.with_name(f"{video.stem}.actions.npz")
    if beside.exists():
        target.with_suffix(".actions.npz").write_bytes(read_small(str(beside)))


@contextlib.contextmanager
def _scratch(policy: FetchConfig) -> Iterator[Path]:
    """A folder of this process, gone after the block; those that killed processes left go first."""
    root = Path(policy.scratch or tempfile.gettempdir()) / f"lampworks-fetch-{os.getuid()}"
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob("*-*"):
        if old.is_dir() and not Path(f"/proc/{old.name.partition('-')[0]}").exists():
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{os.getpid()}-", dir=root) as folder:
        yield Path(folder)
