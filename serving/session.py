"""The life of a session: create, step exactly once, fork. Between the doors (gateway) and the journal and the model."""

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np

from serving.config import Limits
from serving.metrics import GatewayMetrics
from serving.pictures import encode_jpeg
from serving.protocol import (
    Context,
    Flag,
    FrameMessage,
    ModelUnavailable,
    Problem,
    StepJob,
    Stepped,
    Timings,
    check_action,
)
from serving.store import Commit, Row, Session, Store
from serving.worlds import Worlds

log = logging.getLogger(__name__)

NO_ACTION = 255
"""What a prompt frame's message has in the place of an action."""
RETRY_S = 0.05
"""First pause before a step is asked for again; it doubles up to a quarter of a second."""

ATTEMPTS = 3
"""A call that is never answered, as one to a node that has just died, is given up after this part of the timeout."""
LIVE_S = 30.0
"""A session without a socket counts as played for this long after a step."""

T = TypeVar("T")
StateListener = Callable[[str], Awaitable[None]]


class Sessions:
    """All sessions that this gateway's clients reach.

    Args:
        store: the journal.
        worlds: what is served.
        limits: bounds on clients.
        keys: SHA-256 (hex) of the API keys, which open the sessions that they own.
    """

    def __init__(self, store: Store, worlds: Worlds, limits: Limits, keys: Sequence[str] = ()) -> None:
        self.store, self.worlds, self.limits, self._keys = store, worlds, limits, keys
        self.metrics = GatewayMetrics()
        self._open: dict[object, Session] = {}
        self._stepped: dict[str, tuple[float, str]] = {}

    async def create(
        self, frames_THWC: np.ndarray, *, id: str, seed: int, model: str, owner: str, title: str = ""
    ) -> tuple[Session, str]:
        """A new session from prompt frames in the world's shape.

        Returns:
            The session, and its token (kept nowhere: the journal has its hash).

        Raises:
            Problem: 429 over a quota, 503 no replica.
        """
        self._check_quota(owner)
        prompted = await self.patiently(lambda: self.worlds[model].prompt(frames_THWC), None)
        count = len(prompted.tokens_TN)
        first = prompted.step - count + 1
        actions = [-1, *(int(a) for a in prompted.actions_T)]
        rows = [
            Row(
                step=first + i,
                action=actions[i],
                context=i + 1,
                tokens=pack_tokens(prompted.tokens_TN[i]),
                jpeg=encode_jpeg(prompted.frames_THWC[i]),
            )
            for i in range(count)
        ]
        session = Session(
            id=id,
            owner=owner,
            model=model,
            seed=seed,
            first=first,
            start=prompted.step,
            step=prompted.step,
            epoch=0,
            created=time.time(),
            parent=None,
            parent_step=None,
            prompt=hashlib.sha256(frames_THWC.tobytes()).hexdigest(),
            title=title,
        )
        token = secrets.token_urlsafe(32)
        self.store.create(session, token, rows)
        log.info(
            "session created | id %s | owner %s | model %s | seed %d | prompt %s",
            session.id, owner, model, seed, session.prompt,
        )  # fmt: skip
        return session, token

    def open(self, session_id: str, token: str | None) -> Session:
        """The session that a token belongs to, or that an API key owns.

        Raises:
            Problem: 401 without or with an expired token, 404 for no such session and for another's token alike.
        """
        if not token:
            raise Problem(401, "token-missing", "send the session's token as 'Authorization: Bearer <token>'")
        session, owner = self.store.open(session_id, token), self.owner_of(token)
        if session is None and owner is not None:
            found = self.store.look(session_id)
            session = found if found and found.owner == owner else None
        if session is None:
            raise Problem(404, "no-such-session", "there is no such session, or the token is not its own")
        if time.time() - session.created > self.limits.token_days * 86400:
            raise Problem(
                401, "token-expired", f"the session is older than {self.limits.token_days:g} days: start a new one"
            )
        if session.model not in self.worlds:
            raise Problem(
                409, "model-not-served", f"the session plays {session.model}, which is not served here any more",
                model=session.model,
            )  # fmt: skip
        return session

    def owner_of(self, key: str | None) -> str | None:
        """Whose quota an API key's sessions count for; None for what is no key of this server."""
        given = hashlib.sha256((key or "").encode()).hexdigest()
        return f"key:{given[:12]}" if any(hmac.compare_digest(given, known) for known in self._keys) else None

    def is_played(self, session_id: str) -> bool:
        """Whether a player's socket on this gateway has the session."""
        return any(session.id == session_id for session in self._open.values())

    @contextmanager
    def playing(self, session: Session) -> Iterator[None]:
        """The time that a player's socket is open."""
        key = object()
        self._open[key] = session
        try:
            yield
        finally:
            del self._open[key]

    def live(self) -> Counter[str]:
        """Sessions of each version that are played here: by socket, or step by step in the last half minute."""
        since = time.monotonic() - LIVE_S
        self._stepped = {session: at for session, at in self._stepped.items() if at[0] > since}
        played = {session: model for session, (_, model) in self._stepped.items()}
        return Counter((played | {s.id: s.model for s in self._open.values()}).values())

    def attach(self, session: Session) -> Session:
        """Takes the session over; who held it before is fenced at their next commit."""
        attached = self.store.attach(session.id)
        if attached is None:
            raise _gone()
        return attached

    def stored(self, session: Session, step: int, flags: Flag = Flag.REPLAYED) -> FrameMessage:
        """The message of a committed frame.

        Raises:
            Problem: 404 when the session has no such step.
        """
        row = self.store.row(session.id, step)
        if row is None:
            raise _no_step(session, step)
        action = NO_ACTION if row.action < 0 else row.action
        return FrameMessage(step=step, action=action, flags=flags, timings=Timings(), jpeg=row.jpeg)

    async def step(
        self, session: Session, step: int, action: int, on_state: StateListener | None = None
    ) -> tuple[Session, FrameMessage]:
        """Computes and commits a step, or gives the stored frame of one that is committed.

        Args:
            session: as this holder knows it (its epoch and newest step).
            step: the step asked for.
            action: 0 to actions-1.
            on_state: told "resuming" while no replica answers, and "live" after.

        Returns:
            The session after the step, and its frame.

        Raises:
            Problem: 409 for a gap or a full session, 410 when fenced, 422 for the action, 503 without a replica.
        """
        self.check(session, action)
        self._stepped[session.id] = time.monotonic(), session.model
        if step <= session.step:
            self.metrics.duplicate()
            return session, self.stored(session, step)
        if step != session.step + 1:
            raise _gap(step, session.step)
        if step - session.first > self.limits.steps:
            raise Problem(409, "session-full", f"a session has at most {self.limits.steps} steps: fork an earlier one")
        done, flags = await self._compute(session, step, action, on_state)
        began = time.perf_counter()
        jpeg = encode_jpeg(done.frame_HWC)
        encoded = time.perf_counter()
        row = Row(step=step, action=action, context=done.context, tokens=pack_tokens(done.tokens_N), jpeg=jpeg)
        outcome = self.store.commit(session.id, session.epoch, row)
        timings = Timings(
            queue_s=done.queue_s,
            model_s=done.model_s,
            encode_s=encoded - began,
            commit_s=time.perf_counter() - encoded,
        )
        message = FrameMessage(step=step, action=action, flags=flags, timings=timings, jpeg=jpeg)
        return self._settle(outcome, replace(session, step=step), message)

    def fork(self, session: Session, step: int, owner: str) -> tuple[Session, str]:
        """A new session that shares the history up to `step`, with the same seed: the same actions lead to the same
        frames, other actions elsewhere.

        Raises:
            Problem: 404 when there is no such step, 429 over a quota.
        """
        self._check_quota(owner)
        token = secrets.token_urlsafe(32)
        forked = self.store.fork(session.id, step, new_session_id(), token, owner)
        if forked is None:
            raise _no_step(session, step)
        return forked, token

    def _settle(self, outcome: Commit, session: Session, message: FrameMessage) -> tuple[Session, FrameMessage]:
        """What the caller gets after a commit was tried."""
        if outcome is Commit.OK:
            self.metrics.step(message.timings)
            return session, message
        if outcome is Commit.DUPLICATE:  # two requests of one holder for the same step; the first one's frame counts
            return session, self.stored(session, session.step)
        if outcome is Commit.FENCED:
            self.metrics.fenced()
            raise Problem(410, "attached-elsewhere", "the session was opened somewhere else: attach again to take it")
        if outcome is Commit.GONE:
            raise _gone()
        raise _gap(session.step, session.step)

    async def _compute(
        self, session: Session, step: int, action: int, on_state: StateListener | None
    ) -> tuple[Stepped, Flag]:
        """The next frame; the context is read from the journal only when the replica hasn't the session's cache."""
        job = StepJob(session=session.id, seed=session.seed, step=step, action=action, title=session.title)
        done = await self.patiently(lambda: self.worlds[session.model].step(job), on_state)
        if done is not None:
            return done, Flag(0)
        self.metrics.rebuilt()
        rebuilt = replace(job, context=self.context(session, session.step))
        done = await self.patiently(lambda: self.worlds[session.model].step(rebuilt), on_state)
        if done is None:
            raise Problem(503, "model-unavailable", "the replica dropped the session at once", retry_after_s=1)
        return done, Flag.REBUILT

    async def patiently(self, ask: Callable[[], Awaitable[T]], on_state: StateListener | None = None) -> T:
        """Asks until a replica answers.

        Raises:
            Problem: 503 when none does in the step timeout.
        """
        deadline = time.monotonic() + self.limits.step_timeout_s
        pause_s, interrupted = RETRY_S, False
        while True:
            try:
                left_s = deadline - time.monotonic()
                async with asyncio.timeout(min(left_s, self.limits.step_timeout_s / ATTEMPTS)):
                    answer = await ask()
                if interrupted and on_state:
                    await on_state("live")
                return answer
            except (ModelUnavailable, TimeoutError) as error:
                if time.monotonic() + pause_s > deadline:
                    raise Problem(
                        503, "model-unavailable", "no replica of the world answers: it is being restarted, try again",
                        retry_after_s=5,
                    ) from error  # fmt: skip
                if not interrupted:
                    self.metrics.failover()
                    if on_state:
                        await on_state("resuming")
                interrupted = True
                await asyncio.sleep(pause_s)
                pause_s = min(0.25, pause_s * 2)

    def check(self, session: Session, action: int) -> None:
        """Refuses with 422 an action that the session's world doesn't have."""
        check_action(action, self.worlds[session.model].info.actions)

    def context(self, session: Session, step: int) -> Context:
        """What a replica without a cache needs to go on after a step.

        Raises:
            Problem: 404 when play has not come to that step, or the session is gone.
        """
        newest = self.store.row(session.id, step) if step >= session.start else None
        if newest is None:
            raise _no_step(session, step)
        return _context(self.store.rows(session.id, step - newest.context + 1, step))

    def _check_quota(self, owner: str) -> None:
        """Refuses with 429 an owner who stored or created too much."""
        usage = self.store.usage(owner)
        if usage.created_lately >= self.limits.creates_per_min:
            raise Problem(
                429, "too-many-sessions", f"{self.limits.creates_per_min} sessions a minute are allowed: wait a little",
                retry_after_s=60 / self.limits.creates_per_min + 1, limit=self.limits.creates_per_min,
            )  # fmt: skip
        if usage.bytes >= self.limits.stored_bytes:
            raise Problem(
                429, "storage-full", f"your {usage.sessions} sessions hold {usage.bytes} bytes of "
                f"{self.limits.stored_bytes}: delete some", retry_after_s=3600, limit_bytes=self.limits.stored_bytes,
            )  # fmt: skip


def new_session_id() -> str:
    """An id that nobody has: 64 random bits."""
    return secrets.token_hex(8)


def _context(rows: Iterable[Row]) -> Context:
    """Journal rows as the arrays that a replica restores from."""
    kept = list(rows)
    tokens = np.stack([np.frombuffer(r.tokens, "<u2") for r in kept])
    return Context(tokens_TN=tokens, actions_T=np.array([r.action for r in kept[1:]], np.int64))


def pack_tokens(tokens_N: np.ndarray) -> bytes:
    """Tokens as the journal holds them."""
    return tokens_N.astype("<u2").tobytes()


def _gone() -> Problem:
    return Problem(404, "no-such-session", "the session was deleted")


def _no_step(session: Session, step: int) -> Problem:
    detail = f"step {step}: the session has steps {session.first} to {session.step}"
    return Problem(404, "no-such-step", detail, first=session.first, step=session.step)


def _gap(step: int, newest: int) -> Problem:
    return Problem(409, "step-out-of-order", f"step {step} was asked for, the next is {newest + 1}", step=newest)
