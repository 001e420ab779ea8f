"""What every configuration stands on: errors for users, digests, typed (de)serialisation, the home."""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user can mend. The message says what, where and the fix; the command line prints it alone."""


@dataclass(frozen=True)
class Home:
    """The one folder that everything is written under.

    `raw` recorded videos, `datasets` Delta tables, `artifacts` models and evaluations, `runs` training storage and
    checkpoints, `reports` HTML, `mlflow.db` and `mlartifacts` tracking, `sessions.db` the journal of players.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).expanduser().resolve())

    @property
    def raw(self) -> Path:
        """Recorded source videos."""
        return self.path / "raw"

    @property
    def datasets(self) -> Path:
        """Delta tables, one folder a dataset."""
        return self.path / "datasets"

    @property
    def artifacts(self) -> Path:
        """Published models and evaluations, `<name>/<version>`."""
        return self.path / "artifacts"

    @property
    def runs(self) -> Path:
        """Ray Train storage: checkpoints of running and finished trainings."""
        return self.path / "runs"

    @property
    def reports(self) -> Path:
        """Self-contained HTML reports."""
        return self.path / "reports"

    @property
    def sessions_db(self) -> Path:
        """The session store's SQLite file."""
        return self.path / "sessions.db"

    @property
    def tracking_uri(self) -> str:
        """MLflow's embedded store."""
        return f"sqlite:///{self.path / 'mlflow.db'}"

    def ensure(self) -> "Home":
        """Makes the folder and proves that it can be written.

        Raises:
            UserError: the folder can't be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process may prove the same at once
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path} ({error.strerror}): choose another folder with --home"
            ) from error
        return self


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Which Ray cluster to use, and how much of this machine when it is a local one."""

    address: str = "local"
    """"local" starts a private Ray here; "auto" or "host:port" joins a running cluster."""
    cpus: int | None = None
    """Logical CPUs a local Ray offers; None takes the machine's cores, at least 4 (most tasks here are light)."""
    object_store_bytes: int = 400 * 2**20
    """Shared memory of a local Ray. Raw frames never pass through it, so it can be small."""
    quiet: bool = True
    """Keep the workers' own output out of the console; it stays in Ray's log files."""

    def __post_init__(self) -> None:
        if self.cpus is not None and self.cpus < 1:
            raise UserError(f"--cluster.cpus is {self.cpus}: give at least 1, or leave it out")
        if self.object_store_bytes < 80 * 2**20:
            raise UserError(
                f"--cluster.object-store-bytes is {self.object_store_bytes}: Ray needs at least {80 * 2**20}"
            )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps runs."""

    uri: str | None = None
    """Tracking server; None is the embedded SQLite store of the home."""
    experiment: str = "lampworks"
    """MLflow experiment that the runs go under."""
    parent: str | None = None
    """Key of the run that this one is shown under; a sweep sets it for its trials."""


def to_dict(value: Any) -> Any:
    """Dataclasses, paths and tuples to plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a dataclass, mapping or list: equal values, equal digest."""
    text = json.dumps(to_dict(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A dataclass (nested ones too) from plain values.

    Raises:
        UserError: an unknown or missing key, with the nearest known one.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"unknown key {where}{key} for {cls.__name__}: {hint}")
    hints = typing.get_type_hints(cls)
    read = {key: _read(hints[key], value, f"{where}{key}") for key, value in values.items()}
    needed = [n for n, f in fields.items() if n not in read and f.default is f.default_factory is dataclasses.MISSING]
    if needed:
        raise UserError(f"{cls.__name__} lacks {', '.join(where + n for n in needed)}")
    return cls(**read)


def _read(hint: Any, value: Any, where: str) -> Any:
    """One field's value in the type its annotation names."""
    if value is None:
        return None
    hint = _chosen(hint, value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(typing.cast(type, hint), value, where + ".")
    if origin is tuple:
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        return tuple(_read(h, v, where) for h, v in zip(inner, value, strict=True))
    if hint is Path:
        return Path(value)
    return float(value) if hint is float and isinstance(value, int) else value


def _chosen(hint: Any, value: Any) -> Any:
    """What a union means for this value: a mapping is its first dataclass, anything else its first type."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    kinds = [a for a in typing.get_args(hint) if a is not type(None)]
    classes = [k for k in kinds if dataclasses.is_dataclass(k)]
    return (classes if isinstance(value, Mapping) and classes else kinds)[0]


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Shows what is there; changes nothing."""

    what: str = ""
    """Empty: every dataset and artifact. `NAME` or `NAME@VERSION` of one: its versions or its record and lineage.
    `preset`: a preset's parameters beside the paper's."""
    name: str = ""
    """The preset, after `preset`."""
    home: Path = Path("lampworks-home")
    """Folder that everything is written under."""


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Gives an alias of the registry to a version; a running `lampworks serve` notices within seconds."""

    reference: str = ""
    """`NAME@VERSION`, such as world@v3, or `NAME@candidate`."""
    alias: str = "champion"
    """champion: new sessions get it. candidate: a share of them does (`lampworks serve --canary`)."""
    home: Path = Path("lampworks-home")
    """Folder that everything is written under."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Whose registry."""

    def __post_init__(self) -> None:
        name, _, version = self.reference.partition("@")
        if not name or not version:
            raise UserError(f"promote {self.reference!r}: name a version, such as world@v3 or world@candidate")
        if not self.alias.isidentifier():
            raise UserError(f"--alias {self.alias!r}: give one word, such as champion or candidate")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Checks Python, packages, programs, memory and disk, and says the fix."""

    install: bool = False
    """Install missing programs with apt-get where this runs as root."""


def within(flag: str, value: float, low: float, high: float) -> None:
    """Refuses a setting outside a range.

    Raises:
        UserError: the value is outside; it names the flag, the value and the range.
    """
    if not low <= value <= high:
        raise UserError(f"{flag} is {value}: give a value from {low} to {high}")
