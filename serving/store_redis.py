"""The journal in Redis, for the gateways of several machines. The same promises as `serving.store.SqliteStore`.

Each change is one Lua script, which Redis runs alone, so the compare-and-set holds between gateways. A lost reply is
asked for again: every script may run twice without harm. With `appendonly yes` and `appendfsync always` a killed Redis,
or a power cut, loses nothing that was committed. (With `everysec`, Redis holds writes back for up to 2 s while the disk
is busy with an fsync: a kill in that time loses commits. Seen in a soak.)
"""

import json
import logging
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.exceptions import BusyLoadingError, ConnectionError, ResponseError, TimeoutError
from redis.retry import Retry

from serving.store import Commit, Row, Session, Usage, audited, token_hash

log = logging.getLogger(__name__)

PATIENCE = 30
"""Tries before an error is raised: with pauses of up to half a second, about 14 s, in which a Redis restarts."""
PAGE = 256
"""Frames read at once."""

_HEAD = struct.Struct("<iII")
_MUTABLE = ("step", "epoch")
_ENDED = "lampworks:ended"

_COMMIT = """
local s = redis.call('HMGET', KEYS[1], 'epoch', 'step')
if not s[1] then return 'gone' end
if s[1] ~= ARGV[1] then return 'fenced' end
local step, newest = tonumber(ARGV[2]), tonumber(s[2])
if step <= newest then return 'duplicate' end
if step ~= newest + 1 then return 'gap' end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('HSET', KEYS[1], 'step', ARGV[2])
redis.call('HINCRBY', KEYS[1], 'bytes', ARGV[4])
return 'ok'
"""
_ATTACH = "if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end return redis.call('HINCRBY', KEYS[1], 'epoch', 1)"
_FORK = """
if redis.call('EXISTS', KEYS[3]) == 1 then return 1 end
for step = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  local row = redis.call('HGET', KEYS[2], step)
  if not row then redis.call('DEL', KEYS[4]) return 0 end
  redis.call('HSET', KEYS[4], step, row)
end
redis.call('HSET', KEYS[3], unpack(ARGV, 4))
redis.call('ZADD', KEYS[5], ARGV[3], KEYS[3])
return 1
"""


class RedisStore:
    """The journal in one Redis (or a Sentinel's primary).

    Args:
        url: such as redis://:password@host:6379/0.
    """

    def __init__(self, url: str) -> None:
        self._db: Any = redis.Redis.from_url(  # its stubs know neither the sync client's nor decode_responses' types
            url,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), PATIENCE),
            retry_on_error=[ConnectionError, TimeoutError, BusyLoadingError],
            socket_timeout=5,
            socket_connect_timeout=5,
        )
        with suppress(ResponseError):  # a managed Redis may not tell
            kept = self._db.config_get("append*")
            if (kept.get("appendonly", "yes"), kept.get("appendfsync", "always")) != ("yes", "always"):
                log.warning("redis: set appendonly yes and appendfsync always, or a killed Redis loses committed steps")

    def close(self) -> None:
        """Closes the connections."""
        self._db.close()

    def create(self, session: Session, token: str, rows: Sequence[Row]) -> None:
        """Writes a new session with its prompt frames."""
        with self._db.pipeline(transaction=True) as pipe:
            pipe.hset(_frames(session.id), mapping={str(r.step): _packed(r) for r in rows})
            pipe.hset(_key(session.id), mapping=_values(session, token, sum(r.size_bytes for r in rows)))
            pipe.zadd(_owner(session.owner), {_key(session.id): session.created})
            pipe.execute()

    def open(self, session_id: str, token: str) -> Session | None:
        """The session, if there is one and the token is its own."""
        found = self._db.hgetall(_key(session_id))
        return _session(found) if found and found[b"token"] == token_hash(token) else None

    def look(self, session_id: str) -> Session | None:
        """The session, for who may see it by other right than its token's."""
        found = self._db.hgetall(_key(session_id))
        return _session(found) if found else None

    def owned(self, owner: str, most: int) -> list[Session]:
        """An owner's newest sessions, the newest first."""
        with self._db.pipeline(transaction=False) as pipe:
            for key in self._db.zrevrange(_owner(owner), 0, most - 1):
                pipe.hgetall(key)
            return [_session(found) for found in pipe.execute() if found]

    def attach(self, session_id: str) -> Session | None:
        """Starts a new epoch: whoever held the session before can commit no more."""
        self._db.eval(_ATTACH, 1, _key(session_id))
        found = self._db.hgetall(_key(session_id))
        return _session(found) if found else None

    def commit(self, session_id: str, epoch: int, row: Row) -> Commit:
        """Appends a frame if `epoch` still owns the session and `row.step` is the next."""
        given = (epoch, row.step, _packed(row), row.size_bytes)
        return Commit(self._db.eval(_COMMIT, 2, _key(session_id), _frames(session_id), *given).decode())

    def row(self, session_id: str, step: int) -> Row | None:
        """One committed frame."""
        return next(self.rows(session_id, step, step), None)

    def rows(self, session_id: str, first: int, last: int) -> Iterator[Row]:
        """Committed frames first..last, both included, in order."""
        while first <= last:
            steps = range(first, min(first + PAGE, last + 1))
            found = self._db.hmget(_frames(session_id), [str(s) for s in steps])
            yield from (_row(step, packed) for step, packed in zip(steps, found, strict=True) if packed is not None)
            if found[-1] is None:  # past the newest
                return
            first = steps.stop

    def actions(self, session_id: str) -> list[int]:
        """The action of every committed frame, in order."""
        return [row.action for row in self.rows(session_id, 0, 2**31)]

    def fork(self, session_id: str, step: int, new_id: str, token: str, owner: str) -> Session | None:
        """Copies a session up to a step under a new id; None when the parent or the step isn't there."""
        found = self._db.hgetall(_key(session_id))
        parent = _session(found) if found else None
        if parent is None or not parent.start <= step <= parent.step:
            return None
        forked = replace(
            parent, id=new_id, owner=owner, step=step, epoch=0, created=time.time(), parent=session_id, parent_step=step
        )
        size = sum(row.size_bytes for row in self.rows(session_id, parent.first, step))
        values = [part for pair in _values(forked, token, size).items() for part in pair]
        keys = (_key(session_id), _frames(session_id), _key(new_id), _frames(new_id), _owner(owner))
        done = self._db.eval(_FORK, len(keys), *keys, parent.first, step, forked.created, *values)
        return forked if done else None

    def delete(self, session_id: str) -> None:
        """Removes a session and its frames; what the audit needs of it stays."""
        session = self.look(session_id)
        if session is None:
            return
        about = json.dumps(audited(session, self.actions(session_id), time.time()))
        with self._db.pipeline(transaction=True) as pipe:
            pipe.hset(_ENDED, session_id, about)
            pipe.zrem(_owner(session.owner), _key(session_id))
            pipe.delete(_key(session_id), _frames(session_id))
            pipe.execute()

    def audit(self) -> Iterator[dict[str, Any]]:
        """Every session there is or was (`serving.store.audited`)."""
        for key in self._db.scan_iter(_key("*"), count=PAGE):
            if (session := self.look(key.decode().rpartition(":")[2])) is not None:
                yield audited(session, self.actions(session.id), None)
        for _, about in self._db.hscan_iter(_ENDED):
            yield json.loads(about)

    def usage(self, owner: str) -> Usage:
        """What an owner has stored, for the quotas."""
        with self._db.pipeline(transaction=False) as pipe:
            for key in self._db.zrange(_owner(owner), 0, -1):
                pipe.hget(key, "bytes")
            sizes = [int(size or 0) for size in pipe.execute()]
        lately = self._db.zcount(_owner(owner), time.time() - 60, "+inf")
        return Usage(sessions=len(sizes), bytes=sum(sizes), created_lately=int(lately))


def _key(session_id: str) -> str:
    return f"lampworks:session:{session_id}"


def _frames(session_id: str) -> str:
    return f"lampworks:frames:{session_id}"


def _owner(owner: str) -> str:
    return f"lampworks:owner:{owner}"


def _values(session: Session, token: str, size_bytes: int) -> dict[str, str | bytes | int]:
    """A session's hash: what changes as own fields, the rest as JSON."""
    fixed = {f.name: getattr(session, f.name) for f in fields(session) if f.name not in _MUTABLE}
    changing = {name: int(getattr(session, name)) for name in _MUTABLE}
    return {"about": json.dumps(fixed), "token": token_hash(token), "bytes": size_bytes, **changing}


def _session(found: dict[bytes, bytes]) -> Session:
    return Session(**json.loads(found[b"about"]), step=int(found[b"step"]), epoch=int(found[b"epoch"]))


def _packed(row: Row) -> bytes:
    return _HEAD.pack(row.action, row.context, len(row.tokens)) + row.tokens + row.jpeg


def _row(step: int, packed: bytes) -> Row:
    action, context, size = _HEAD.unpack_from(packed)
    middle = _HEAD.size + size
    return Row(step=step, action=action, context=context, tokens=packed[_HEAD.size : middle], jpeg=packed[middle:])
