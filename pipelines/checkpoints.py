"""Checkpoints of a training: whole or absent, verified before they are used, kept by policy, in the training's folder
or in an object store. Knows no torch."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyarrow import fs

from infra.config import UserError
from pipelines.buckets import BucketPath, place
from pipelines.train_config import KeepConfig

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHOSEN = "chosen.json"
FULL = (errno.ENOSPC, errno.EDQUOT)
PATIENCE_S = 1800.0
"""How much later than rank 0 another rank may be done with writing."""

Found = tuple[Path, dict[str, Any]]
Files = Mapping[str, Callable[[Path], object]]
"""Name inside the checkpoint -> what writes that file to a local path."""


class Checkpoints:
    """The checkpoints of a training, `step-<number>/`: below `keep.to`, or in the training's folder.

    Every rank writes its share, then the digests of its files; rank 0 waits for all shares and writes the manifest.
    A folder without manifest is no checkpoint.

    Attributes:
        floor: the newest checkpoint up to this step is kept too.
    """

    def __init__(self, folder: Path, keep: KeepConfig) -> None:
        self.folder = place(keep.to) / folder.name if keep.to else folder / "checkpoints"
        self.keep, self.record = keep, folder / CHOSEN
        self.floor: int | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step:09d}"

    def prove(self) -> None:
        """Proves that checkpoints can be written where they should be.

        Raises:
            UserError: they can't.
        """
        probe = self.folder / ".writable"
        try:
            _write_whole(probe, "")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder} ({error}): mend that or --keep.to") from error

    def share(self, step: int, rank: int, files: Files) -> None:
        """Writes one rank's files; any number of ranks may do so at once.

        Raises:
            UserError: there is no room for them.
        """
        folder = self.path(step)
        try:
            digests = {name: _put(folder / name, write) for name, write in files.items()}
            _write_whole(folder / f"rank-{rank:05d}.json", json.dumps(digests))
        except (OSError, RuntimeError) as error:  # torch hides the system's error behind its own
            if not is_full(error):
                raise
            for name in files:
                (folder / name).unlink(missing_ok=True)
            raise UserError(
                f"no room for the checkpoint of step {step} in {self.folder}: the ones before are kept, free some "
                "space and give the same command again"
            ) from error

    def commit(self, facts: Mapping[str, Any]) -> None:
        """Makes the shares of `facts["world"]` ranks a checkpoint, then lets go of those that the policy does not keep.

        Raises:
            TimeoutError: a rank's share did not come.
        """
        folder, end = self.path(facts["step"]), time.monotonic() + PATIENCE_S
        while len(shares := sorted(folder.glob("rank-*.json"))) < facts["world"]:
            if time.monotonic() > end:
                raise TimeoutError(f"{len(shares)} of {facts['world']} ranks wrote their share of {folder}")
            time.sleep(0.02 if self.keep.to is None else 0.5)
        files = {name: digest for share in shares for name, digest in json.loads(share.read_text()).items()}
        _write_whole(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=1))
        self._let_go()

    def choose(self) -> tuple[Found | None, list[str]]:
        """The newest whole checkpoint, remembered for the workers; and a sentence for each that is damaged.

        A damaged one is put aside under another name, so it is neither chosen nor counted again.
        """
        damaged: list[str] = []
        found: Found | None = None
        for path in reversed(self._all()):
            manifest, fault = _verified(path)
            if fault is None:
                found = path, manifest
                break
            _put_aside(path)
            damaged.append(f"checkpoint {path.name} is damaged ({fault}): falling back to the one before")
        whole = {path.name for path in self._all()}
        for path in self.folder.glob("step-*"):
            if path.name not in whole:
                _remove(path)
        _write_whole(self.record, json.dumps({"name": found[0].name if found else None}))
        return found, damaged

    def chosen(self) -> Found | None:
        """What `choose` decided at this start; all workers and the feed go by it."""
        name = json.loads(self.record.read_text())["name"] if self.record.exists() else None
        if name is None:
            return None
        path = self.folder / name
        return path, json.loads((path / MANIFEST).read_text())

    def forget_after(self, step: int) -> None:
        """Removes what is newer than this step."""
        for path in self._all():
            if _step(path) > step:
                _remove(path)

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if (path / MANIFEST).exists())

    def _let_go(self) -> None:
        every = self._all()
        kept = set(every[-self.keep.last :])
        if self.keep.every:
            kept |= {p for p in every if _step(p) % self.keep.every == 0}
        if self.keep.best:
            kept.add(min(every, key=_loss))
        if self.floor is not None:
            kept |= set([p for p in every if _step(p) <= self.floor][-1:])
        for path in every:
            if path not in kept:
                _remove(path)


class Writer:
    """Work in a thread, one piece at a time; what fails there is raised by the next call."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins a piece of work, after the one before is done."""
        self.wait()
        self._thread = threading.Thread(target=self._body, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what has failed by now."""
        if self._failed is not None:
            raise self._failed

    def wait(self) -> None:
        """Until nothing is under way."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def _body(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 raised where the loop stands
            self._failed = error


def one_works(work: Callable[[], object], mine: bool, done: Path, barrier: Callable[[], object]) -> None:
    """Work of one process while the others wait on a file, as long as it takes: in a collective they would be taken as
    hung after `--hang-s`, and an 11B world's files take longer than that.

    Args:
        work: what one of them does.
        mine: whether that is this process.
        done: a file that all of those who wait see.
        barrier: all processes wait for each other.
    """
    if mine:
        done.unlink(missing_ok=True)
    barrier()
    if mine:
        work()
        done.touch()
    while not done.exists():  # the death of the one who works ends them all
        time.sleep(0.05)
    barrier()
    if mine:
        done.unlink(missing_ok=True)  # workers of a start before may still be ending


@contextlib.contextmanager
def at_hand(path: Path, first: bool, barrier: Callable[[], None]) -> Iterator[Path]:
    """A checkpoint as local files for the time of the block: what lies in an object store is fetched once a node.

    Args:
        path: of the checkpoint.
        first: whether this process fetches for its node.
        barrier: all processes wait for each other.
    """
    if not isinstance(path, BucketPath):
        yield path
        return
    room = Path(tempfile.gettempdir()) / f"lampworks-{os.getuid()}-{path.parent.name}-{path.name}"

    def fetch() -> None:
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(mode=0o700)
        fs.copy_files(path.key, str(room), source_filesystem=path.system)
        fault = _verified(room)[1]
        if fault is not None:
            raise OSError(f"{path} was not fetched well: {fault}")

    one_works(fetch, first, room / ".done", barrier)
    yield room
    barrier()
    if first:
        shutil.rmtree(room)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _loss(path: Path) -> float:
    loss = float(json.loads((path / MANIFEST).read_text()).get("loss", math.nan))
    return loss if math.isfinite(loss) else math.inf


def _verified(path: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest, and what is wrong with the checkpoint if anything is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        names = list(manifest["files"])
        with ThreadPoolExecutor(8) as readers:
            digests = list(readers.map(_sha256, [path / name for name in names]))
        for name, digest in zip(names, digests, strict=True):
            if manifest["files"][name] != digest:
                return manifest, f"{name} differs from what was written"
    except (OSError, ValueError, KeyError) as error:
        return {}, f"{type(error).__name__}: {error}"
    return manifest, None


def _put(path: Path, write: Callable[[Path], object]) -> str:
    """A file of a checkpoint, at once on its disk or uploaded; its digest."""
    with contextlib.ExitStack() as stack:
        local = path
        if isinstance(path, BucketPath):
            local = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lampworks-"))) / path.name
        local.parent.mkdir(parents=True, exist_ok=True)
        write(local)
        digest = _sha256(local)
        if isinstance(path, BucketPath):
            path.upload(local)
        else:
            _sync(path)
    return digest


def _write_whole(path: Path, text: str) -> None:
    """A small file, all of it or nothing."""
    if isinstance(path, BucketPath):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    _sync(draft)
    draft.replace(path)
    _sync(path.parent)


def _remove(path: Path) -> None:
    """Manifest first: half removed is no checkpoint, rather than a damaged one."""
    (path / MANIFEST).unlink(missing_ok=True)
    if isinstance(path, BucketPath):
        path.system.delete_dir(path.key)
    else:
        shutil.rmtree(path)


def _put_aside(path: Path) -> None:
    aside = path.with_name(f"damaged-{path.name}")
    if isinstance(path, BucketPath) and isinstance(aside, BucketPath):
        fs.copy_files(path.key, aside.key, path.system, path.system)
        _remove(path)
    else:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk stands behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        if not isinstance(path, BucketPath):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while part := file.read(1 << 22):
            digest.update(part)
        return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
