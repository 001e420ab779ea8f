"""What travels between players and the gateway: binary play messages, close codes, problem details."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Protocol

import numpy as np

SUBPROTOCOL = "lampworks.v1"
TOKEN_PREFIX = "token."
"""A browser's socket can't set headers and a token in a URL ends up in logs, so it travels as a subprotocol."""

MAX_SEED = 2**53 - 1
"""Largest seed: the largest whole number that JavaScript holds exactly."""

_UP = struct.Struct("<IB")
_DOWN = struct.Struct("<BBBxIIIII")
_MICRO = 1e6


class Problem(Exception):
    """A refusal with its reason (RFC 9457 problem details); over a socket it closes with code 4000 + status.

    Attributes:
        status: HTTP status.
        slug: stable name of the kind of problem, the tail of `type`.
        detail: what is wrong, with the offending value, and what to do.
        retry_after_s: when to try again, for 429 and 503.
        extra: more members, such as the limit that was hit.
    """

    def __init__(
        self, status: int, slug: str, detail: str, *, retry_after_s: float | None = None, **extra: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.slug, self.detail = status, slug, detail
        self.retry_after_s, self.extra = retry_after_s, extra

    @property
    def close_code(self) -> int:
        """WebSocket close code: 4401 for 401, 4409 for 409 and so on."""
        return 4000 + self.status

    def body(self) -> dict[str, Any]:
        """The problem-details document."""
        title = self.slug.replace("-", " ").capitalize()
        wait = {} if self.retry_after_s is None else {"retry_after_s": self.retry_after_s}
        kind = f"urn:lampworks:problem:{self.slug}"
        return {"type": kind, "title": title, "status": self.status, "detail": self.detail, **wait, **self.extra}

    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to the refusal."""
        found: dict[str, str] = {}
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> "Problem":
        """The problem that a server's document describes."""
        known = {"type", "title", "status", "detail", "retry_after_s"}
        extra = {k: v for k, v in body.items() if k not in known}
        slug = str(body.get("type", "")).rpartition(":")[2] or "unknown"
        return cls(int(body["status"]), slug, str(body["detail"]), retry_after_s=body.get("retry_after_s"), **extra)


class Flag(IntFlag):
    """What is special about a frame that comes down."""

    GREETING = 1
    """The newest committed frame, sent when a player attaches."""
    REPLAYED = 2
    """The step was committed before; this is its stored frame."""
    REBUILT = 4
    """The replica had no cache of the session and rebuilt it from the journal."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where a step's time went, in seconds."""

    queue_s: float = 0.0
    model_s: float = 0.0
    encode_s: float = 0.0
    commit_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FrameMessage:
    """One frame on its way down: 24 bytes of header (little-endian), then a JPEG.

    u8 version (1) | u8 flags | u8 action | pad | u32 step | u32 queue, model, encode, commit time in microseconds.
    """

    step: int
    action: int
    """The action that led to this frame; 255 for a prompt frame."""
    flags: Flag
    timings: Timings
    jpeg: bytes

    def pack(self) -> bytes:
        """The bytes to send."""
        t = self.timings
        micros = [min(int(x * _MICRO), 2**32 - 1) for x in (t.queue_s, t.model_s, t.encode_s, t.commit_s)]
        return _DOWN.pack(1, int(self.flags), self.action, self.step, *micros) + self.jpeg

    @classmethod
    def unpack(cls, message: bytes) -> "FrameMessage":
        """The frame in a received message.

        Raises:
            ValueError: shorter than a header, or of another version.
        """
        if len(message) < _DOWN.size or message[0] != 1:
            raise ValueError(f"not a version 1 frame message: {len(message)} bytes, the first {message[:1]!r}")
        _, flags, action, step, queue, model, encode, commit = _DOWN.unpack_from(message)
        timings = Timings(
            queue_s=queue / _MICRO, model_s=model / _MICRO, encode_s=encode / _MICRO, commit_s=commit / _MICRO
        )
        return cls(step=step, action=action, flags=Flag(flags), timings=timings, jpeg=message[_DOWN.size :])


def pack_step(step: int, action: int) -> bytes:
    """The 5 bytes that ask for a step: u32 step, u8 action, little-endian."""
    return _UP.pack(step, action)


def unpack_step(message: bytes, actions: int) -> tuple[int, int]:
    """Step and action of a received message.

    Raises:
        Problem: 400 for another length, 422 for an action that the world doesn't have.
    """
    if len(message) != _UP.size:
        raise Problem(400, "bad-message", f"a step is {_UP.size} bytes (u32 step, u8 action), got {len(message)}")
    step, action = _UP.unpack(message)
    check_action(action, actions)
    return step, action


def check_action(action: int, actions: int) -> None:
    """Refuses an action outside 0..actions-1 with 422."""
    if not 0 <= action < actions:
        raise Problem(
            422, "action-out-of-range", f"action {action}: this world has actions 0 to {actions - 1}", actions=actions
        )


# -- between a gateway and a model replica: plain values, so that a gateway never imports torch ----------------------


class ModelUnavailable(Exception):
    """The replica died, is being replaced, or none is there yet; the step may be asked for again."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a gateway and a player need to know about a served world."""

    reference: str
    """`name@version` of the artifact."""
    actions: int
    height_px: int
    width_px: int
    fps: float
    prompt_frames: int
    """Most frames that a prompt may have."""
    words: int = 0
    """Words of a title that the world listens to; 0 where it was trained without titles."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """All that a replica needs to rebuild a session exactly."""

    tokens_TN: np.ndarray
    """uint16 tokens of the frames since the cache's epoch began, the newest last."""
    actions_T: np.ndarray
    """The actions between them, T-1 values."""


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """A step to compute. Its noise depends on (seed, step) alone, so asking twice gives the same frame."""

    session: str
    seed: int
    step: int
    action: int
    title: str = ""
    """What the world is told about itself; it counts where a context is sent."""
    context: Context | None = None
    """Sent after a replica answered that it has no cache of the session at `step - 1`."""


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """A computed step."""

    tokens_N: np.ndarray
    frame_HWC: np.ndarray
    context: int
    """How many newest frames rebuild the state after this step."""
    queue_s: float
    model_s: float


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """A prompt as the world sees it."""

    step: int
    """Index of the newest prompt frame."""
    tokens_TN: np.ndarray
    actions_T: np.ndarray
    """Actions inferred between several prompt frames, T-1 values."""
    frames_THWC: np.ndarray
    """The prompt after the tokenizer: what the player starts from."""


class Model(Protocol):
    """A served world: in this process, or a deployment of replicas."""

    info: ModelInfo

    async def ready(self) -> bool:
        """Whether a step could be computed now."""
        ...

    async def prompt(self, frames_THWC: np.ndarray) -> Prompted:
        """Tokens of prompt frames."""
        ...

    async def step(self, job: StepJob) -> Stepped | None:
        """The next frame; None when the context must be sent along.

        Raises:
            ModelUnavailable: ask again.
        """
        ...

    async def forget(self, session: str) -> None:
        """Frees what is held for a session that nobody will go on with; a hint, never needed."""
        ...
