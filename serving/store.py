"""The journal of sessions: every frame of every player, committed exactly once (SQLite).

A commit is a compare-and-set on (epoch, step): a step lands only directly after its predecessor and only for the
latest owner. Attaching starts a new epoch, so a gateway that was superseded is fenced. SQLite in WAL mode lets every
gateway of the machine write the same file; a process killed in the middle of a commit leaves nothing of it.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from infra.config import UserError

_SCHEMA = """
create table if not exists sessions(
    id text primary key, token blob not null, owner text not null, model text not null, seed integer not null,
    first integer not null, start integer not null, step integer not null, epoch integer not null,
    created real not null, parent text, parent_step integer, prompt text not null, bytes integer not null,
    title text not null default '');
create index if not exists sessions_owner on sessions(owner, created);
create table if not exists frames(
    session text not null, step integer not null, action integer not null, context integer not null,
    tokens blob not null, jpeg blob not null, primary key(session, step)) without rowid;
create table if not exists ended(id text primary key, about text not null);
"""
_COLUMNS = "id, owner, model, seed, first, start, step, epoch, created, parent, parent_step, prompt, title"


class Commit(Enum):
    """What became of a commit."""

    OK = "ok"
    DUPLICATE = "duplicate"
    GAP = "gap"
    FENCED = "fenced"
    GONE = "gone"


@dataclass(frozen=True, kw_only=True)
class Session:
    """One player's session as the journal knows it."""

    id: str
    owner: str
    model: str
    """Reference of the world artifact; a session stays on its version."""
    seed: int
    first: int
    """Step of the oldest prompt frame."""
    start: int
    """Step of the newest prompt frame, where play begins."""
    step: int
    """Newest committed step."""
    epoch: int
    created: float
    """Unix time, seconds UTC."""
    parent: str | None
    parent_step: int | None
    prompt: str
    """SHA-256 of the prompt pixels, for the audit."""
    title: str = ""
    """What the world is told about itself, where it listens."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One committed frame."""

    step: int
    action: int
    """The action that led here; -1 for the oldest prompt frame."""
    context: int
    """How many of the newest frames, this one included, rebuild a replica's exact state."""
    tokens: bytes
    """uint16 little-endian, N of them."""
    jpeg: bytes

    @property
    def size_bytes(self) -> int:
        """What the row counts for in its owner's quota."""
        return len(self.tokens) + len(self.jpeg)


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What an owner has in the journal."""

    sessions: int
    bytes: int
    created_lately: int
    """Sessions created in the last minute."""


class Store(Protocol):
    """Where sessions are kept; `SqliteStore` and `serving.store_redis.RedisStore` say what each door promises."""

    def create(self, session: Session, token: str, rows: Sequence[Row]) -> None: ...  # noqa: D102

    def open(self, session_id: str, token: str) -> Session | None: ...  # noqa: D102

    def look(self, session_id: str) -> Session | None: ...  # noqa: D102

    def owned(self, owner: str, most: int) -> list[Session]: ...  # noqa: D102

    def attach(self, session_id: str) -> Session | None: ...  # noqa: D102

    def commit(self, session_id: str, epoch: int, row: Row) -> Commit: ...  # noqa: D102

    def row(self, session_id: str, step: int) -> Row | None: ...  # noqa: D102

    def rows(self, session_id: str, first: int, last: int) -> Iterator[Row]: ...  # noqa: D102

    def actions(self, session_id: str) -> list[int]: ...  # noqa: D102

    def fork(self, session_id: str, step: int, new_id: str, token: str, owner: str) -> Session | None: ...  # noqa: D102

    def delete(self, session_id: str) -> None: ...  # noqa: D102

    def audit(self) -> Iterator[dict[str, Any]]: ...  # noqa: D102

    def usage(self, owner: str) -> Usage: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


def open_store(address: str) -> Store:
    """The journal at a path (SQLite) or at a redis:// URL.

    Raises:
        UserError: a redis:// URL, but the Redis client is not installed.
    """
    if not address.startswith(("redis://", "rediss://", "unix://")):
        return SqliteStore(Path(address))
    try:
        from serving.store_redis import RedisStore  # an extra: one machine needs no Redis
    except ImportError as error:
        raise UserError(f"--store {address} needs the Redis client: pip install 'lampworks[cluster]'") from error
    return RedisStore(address)


class SqliteStore:
    """The journal in one SQLite file, for the gateways of one machine. Not for several threads."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30, check_same_thread=False)
        self._db.execute("pragma journal_mode=WAL")
        self._db.execute("pragma synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        if "title" not in {column[1] for column in self._db.execute("pragma table_info(sessions)")}:  # an older journal
            self._db.execute("alter table sessions add column title text not null default ''")

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the write lock from its start, so that what it read stays true."""
        self._db.execute("begin immediate")
        try:
            yield self._db
        except BaseException:
            self._db.execute("rollback")
            raise
        self._db.execute("commit")

    def create(self, session: Session, token: str, rows: Sequence[Row]) -> None:
        """Writes a new session with its prompt frames."""
        size = sum(r.size_bytes for r in rows)
        s = session
        values = (s.id, token_hash(token), s.owner, s.model, s.seed, s.first, s.start, s.step, s.epoch)
        with self._writing() as db:
            db.execute(
                "insert into sessions values(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (*values, s.created, s.parent, s.parent_step, s.prompt, size, s.title),
            )
            db.executemany("insert into frames values(?,?,?,?,?,?)", [_values(s.id, r) for r in rows])

    def open(self, session_id: str, token: str) -> Session | None:
        """The session, if there is one and the token is its own; nothing tells the two apart."""
        found = self._db.execute(
            f"select {_COLUMNS} from sessions where id=? and token=?", (session_id, token_hash(token))
        ).fetchone()
        return None if found is None else _session(found)

    def look(self, session_id: str) -> Session | None:
        """The session, for who may see it by other right than its token's."""
        found = self._db.execute(f"select {_COLUMNS} from sessions where id=?", (session_id,)).fetchone()
        return None if found is None else _session(found)

    def owned(self, owner: str, most: int) -> list[Session]:
        """An owner's newest sessions, the newest first."""
        found = self._db.execute(
            f"select {_COLUMNS} from sessions where owner=? order by created desc limit ?", (owner, most)
        )
        return [_session(values) for values in found]

    def attach(self, session_id: str) -> Session | None:
        """Starts a new epoch: whoever held the session before can commit no more."""
        found = self._db.execute(
            f"update sessions set epoch=epoch+1 where id=? returning {_COLUMNS}", (session_id,)
        ).fetchone()
        return None if found is None else _session(found)

    def commit(self, session_id: str, epoch: int, row: Row) -> Commit:
        """Appends a frame if `epoch` still owns the session and `row.step` is the next."""
        with self._writing() as db:
            found = db.execute("select epoch, step from sessions where id=?", (session_id,)).fetchone()
            if found is None:
                return Commit.GONE
            if found[0] != epoch:
                return Commit.FENCED
            if row.step != found[1] + 1:
                return Commit.DUPLICATE if row.step <= found[1] else Commit.GAP
            db.execute("insert into frames values(?,?,?,?,?,?)", _values(session_id, row))
            db.execute("update sessions set step=?, bytes=bytes+? where id=?", (row.step, row.size_bytes, session_id))
        return Commit.OK

    def row(self, session_id: str, step: int) -> Row | None:
        """One committed frame."""
        return next(self.rows(session_id, step, step), None)

    def rows(self, session_id: str, first: int, last: int) -> Iterator[Row]:
        """Committed frames first..last, both included, in order."""
        found = self._db.execute(
            "select step, action, context, tokens, jpeg from frames where session=? and step between ? and ? "
            "order by step",
            (session_id, first, last),
        )
        for step, action, context, tokens, jpeg in found:
            yield Row(step=step, action=action, context=context, tokens=tokens, jpeg=jpeg)

    def actions(self, session_id: str) -> list[int]:
        """The action of every committed frame, in order."""
        found = self._db.execute("select action from frames where session=? order by step", (session_id,))
        return [action for (action,) in found]

    def fork(self, session_id: str, step: int, new_id: str, token: str, owner: str) -> Session | None:
        """Copies a session up to a step under a new id.

        Returns:
            The new session; None when the parent or the step isn't there.
        """
        with self._writing() as db:
            copied = db.execute(
                "insert into sessions select ?, ?, ?, model, seed, first, start, ?, 0, ?, id, ?, prompt, "
                "(select sum(length(tokens) + length(jpeg)) from frames where session=? and step<=?), title "
                f"from sessions where id=? and start<=? and step>=? returning {_COLUMNS}",
                (new_id, token_hash(token), owner, step, time.time(), step, session_id, step, session_id, step, step),
            ).fetchone()
            if copied is None:
                return None
            db.execute(
                "insert into frames select ?, step, action, context, tokens, jpeg from frames "
                "where session=? and step<=?",
                (new_id, session_id, step),
            )
        return _session(copied)

    def delete(self, session_id: str) -> None:
        """Removes a session and its frames; what the audit needs of it stays."""
        with self._writing() as db:
            session = self.look(session_id)
            if session is None:
                return
            about = json.dumps(audited(session, self.actions(session_id), time.time()))
            db.execute("insert into ended values(?,?)", (session_id, about))
            db.execute("delete from frames where session=?", (session_id,))
            db.execute("delete from sessions where id=?", (session_id,))

    def audit(self) -> Iterator[dict[str, Any]]:
        """Every session there is or was (`audited`)."""
        for found in self._db.execute(f"select {_COLUMNS} from sessions order by created").fetchall():
            session = _session(found)
            yield audited(session, self.actions(session.id), None)
        for (about,) in self._db.execute("select about from ended order by rowid"):
            yield json.loads(about)

    def usage(self, owner: str) -> Usage:
        """What an owner has stored, for the quotas."""
        count, size, lately = self._db.execute(
            "select count(*), coalesce(sum(bytes), 0), coalesce(sum(created > ?), 0) from sessions where owner=?",
            (time.time() - 60, owner),
        ).fetchone()
        return Usage(sessions=count, bytes=size, created_lately=lately)


def audited(session: Session, actions: Sequence[int], ended: float | None) -> dict[str, Any]:
    """What an audit keeps of a session: with the model, the seed and the prompt its actions determine every frame."""
    kept = ("id", "owner", "model", "seed", "prompt", "title", "created", "parent", "parent_step", "step")
    return {**{name: getattr(session, name) for name in kept}, "actions": list(actions), "ended": ended}


def token_hash(token: str) -> bytes:
    """What the journal keeps of a token: tokens have 256 random bits, so a plain SHA-256 is enough."""
    return hashlib.sha256(token.encode()).digest()


def _session(found: Sequence[object]) -> Session:
    return Session(**dict(zip(_COLUMNS.split(", "), found, strict=True)))  # pyrefly: ignore[bad-argument-type]


def _values(session_id: str, row: Row) -> tuple[str, int, int, int, bytes, bytes]:
    return session_id, row.step, row.action, row.context, row.tokens, row.jpeg
