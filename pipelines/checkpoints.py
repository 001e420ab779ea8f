"""Checkpoints of a training: whole or absent, verified before they are used, kept by policy. Knows no torch."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.train_config import KeepConfig

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
CHOSEN = "chosen.json"

Found = tuple[Path, dict[str, Any]]


class Checkpoints:
    """The checkpoints in a training's folder, `checkpoints/step-<number>/`.

    A checkpoint is written as a draft, gets a manifest with the digest of every file, and takes its name last.
    """

    def __init__(self, folder: Path, keep: KeepConfig) -> None:
        self.folder, self.keep = folder / "checkpoints", keep

    def draft(self, step: int) -> Path:
        """A folder to write into; every rank may ask for it."""
        path = self.folder / f".draft-{step:09d}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, draft: Path, facts: Mapping[str, Any]) -> Path:
        """Gives a written draft its name, then lets go of those that the policy does not keep."""
        files = {str(p.relative_to(draft)): _sha256(p) for p in sorted(draft.rglob("*")) if p.is_file()}
        manifest = draft / MANIFEST
        manifest.write_text(json.dumps({**facts, "files": files}, indent=1))
        for path in (*(draft / name for name in files), manifest):
            _sync(path)
        final = self.folder / f"step-{facts['step']:09d}"
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        _sync(self.folder)
        self._let_go()
        return final

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
            path.rename(path.with_name(f"damaged-{path.name}"))
            damaged.append(f"checkpoint {path.name} is damaged ({fault}): falling back to the one before")
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".draft-*"):
            shutil.rmtree(leftover)
        record = self.folder / f".{CHOSEN}"
        record.write_text(json.dumps({"name": found[0].name if found else None}))
        record.replace(self.folder / CHOSEN)
        return found, damaged

    def chosen(self) -> Found | None:
        """What `choose` decided at this start; all workers and the feed go by it."""
        record = self.folder / CHOSEN
        name = json.loads(record.read_text())["name"] if record.exists() else None
        if name is None:
            return None
        path = self.folder / name
        return path, json.loads((path / MANIFEST).read_text())

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))

    def _let_go(self) -> None:
        every = self._all()
        kept = set(every[-self.keep.last :])
        if self.keep.every:
            kept |= {p for p in every if int(p.name.split("-")[1]) % self.keep.every == 0}
        if self.keep.best:
            kept.add(min(every, key=_loss))
        for path in every:
            if path not in kept:
                shutil.rmtree(path)


def _loss(path: Path) -> float:
    loss = float(json.loads((path / MANIFEST).read_text()).get("loss", math.nan))
    return loss if math.isfinite(loss) else math.inf


def _verified(path: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest, and what is wrong with the checkpoint if anything is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, digest in manifest["files"].items():
            if _sha256(path / name) != digest:
                return manifest, f"{name} differs from what was written"
    except (OSError, ValueError, KeyError) as error:
        return {}, f"{type(error).__name__}: {error}"
    return manifest, None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
