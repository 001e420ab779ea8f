"""Artifacts: `name@version` folders with a recorded fingerprint, the code commit and their parents.

An artifact is written once, atomically, and never changed. `identity` is the digest of what it was made from
(configuration and parents): a command that finds its identity already published has nothing to do.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infra.config import Home, UserError, digest

RECORD = "artifact.json"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class ArtifactError(UserError):
    """An artifact is missing, of another kind, or not what was published."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One published folder and where it came from."""

    name: str
    version: str
    kind: str
    path: Path
    config: dict[str, Any]
    parents: dict[str, str]
    """role -> reference, such as {"dataset": "platformers@3", "tokenizer": "tokenizer@v1"}"""
    metrics: dict[str, float]
    files: dict[str, str]
    """relative path -> SHA-256"""
    identity: str
    fingerprint: str
    git_commit: str
    created: str

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


def publish(
    home: Home,
    *,
    name: str,
    kind: str,
    source_dir: Path,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    metrics: Mapping[str, float],
    identity: str,
) -> Artifact:
    """Copies `source_dir` into the home as the next version of `name`, atomically.

    Raises:
        ArtifactError: the name has characters other than a-z, 0-9, '.', '_' and '-'.
    """
    if not NAME.fullmatch(name):
        raise ArtifactError(
            f"artifact name {name!r}: use 1 to 64 of a-z, 0-9, '.', '_' and '-', a letter or digit first"
        )
    folder = home.artifacts / name
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / f".new-{uuid.uuid4().hex}"
    shutil.copytree(source_dir, staging)
    files = {str(p.relative_to(staging)): _sha256(p) for p in sorted(staging.rglob("*")) if p.is_file()}
    fields: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "config": dict(config),
        "parents": dict(parents),
        "metrics": {k: float(v) for k, v in metrics.items()},
        "files": files,
        "identity": identity,
        "fingerprint": digest(files),
        "git_commit": _git_commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    while True:
        taken = [int(p.name[1:]) for p in folder.glob("v*") if p.name[1:].isdigit()]
        version = f"v{max(taken, default=0) + 1}"
        _write_synced(staging / RECORD, json.dumps({"version": version, **fields}, indent=1, sort_keys=True))
        try:
            staging.rename(folder / version)  # fails when another process took this version: a folder is not replaced
        except OSError:
            if not (folder / version).exists():
                raise
            continue
        return Artifact(version=version, path=folder / version, **fields)


def resolve(home: Home, reference: str, *, kind: str | None = None) -> Artifact:
    """The artifact that `name` (its newest version), `name@version` or a folder's path names, every file verified.

    Raises:
        ArtifactError: there is none, its kind is another, or a file differs from what was published.
    """
    path = Path(reference)
    if not (path / RECORD).is_file():
        path = _find_folder(home, reference)
    artifact = _read(path)
    if kind is not None and artifact.kind != kind:
        raise ArtifactError(f"{artifact.reference} is a {artifact.kind}, a {kind} is needed: name a {kind} artifact")
    for name, want in artifact.files.items():
        file = path / name
        if not file.is_file() or _sha256(file) != want:
            raise ArtifactError(
                f"{file} is missing or differs from what was published: restore it, or train {artifact.name} again"
            )
    return artifact


def find(home: Home, *, name: str, identity: str) -> Artifact | None:
    """The newest version of `name` that was made from the same things, if any."""
    return next((a for a in reversed(versions(home, name)) if a.identity == identity), None)


def versions(home: Home, name: str | None = None) -> list[Artifact]:
    """Every published version (of one name), oldest first, files not verified."""
    records = home.artifacts.glob(f"{name or '*'}/v*/{RECORD}")
    found = [_read(p.parent) for p in records]
    return sorted(found, key=lambda a: (a.name, int(a.version[1:])))


def lineage(home: Home, reference: str) -> list[Artifact]:
    """The artifact and all its ancestors that are artifacts, nearest first."""
    found: dict[str, Artifact] = {}
    waiting = [reference]
    while waiting:
        artifact = resolve(home, waiting.pop(0))
        found.setdefault(artifact.reference, artifact)
        known = {p for p in artifact.parents.values() if (home.artifacts / p.replace("@", "/")).is_dir()}
        waiting += sorted(known - set(found) - set(waiting))
    return list(found.values())


def _find_folder(home: Home, reference: str) -> Path:
    name, _, version = reference.partition("@")
    known = versions(home, name) if NAME.fullmatch(name) else []
    if not known:
        names = sorted({p.parent.name for p in home.artifacts.glob("*/v*")})
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(names) or 'none yet'}"
        raise ArtifactError(f"no artifact {reference!r} under {home.artifacts}: {hint}")
    chosen = next((a for a in known if a.version == version), None) if version else known[-1]
    if chosen is None:
        raise ArtifactError(f"no version {version!r} of {name}: there are {', '.join(a.version for a in known)}")
    return chosen.path


def _read(path: Path) -> Artifact:
    try:
        fields = json.loads((path / RECORD).read_text())
        return Artifact(path=path, **fields)
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path / RECORD} can't be read ({error}): restore it or remove the folder") from error


def describe(artifact: Artifact) -> dict[str, Any]:
    """The record as plain values, for printing."""
    return {**asdict(artifact), "path": str(artifact.path), "reference": artifact.reference}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _git_commit() -> str:
    """The commit of the code that runs, "unknown" outside a checkout; "+dirty" where files differ from it."""
    where = Path(__file__).parent
    try:
        done = [
            subprocess.run(
                ["git", *words], cwd=where, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done[0] + ("+dirty" if done[1] else "")
