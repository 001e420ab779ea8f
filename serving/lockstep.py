"""What both Python clients share: how steps are asked for, what answers mean, and how requests look."""

import base64
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from serving.pictures import decode_jpeg
from serving.protocol import SUBPROTOCOL, TOKEN_PREFIX, Flag, FrameMessage, Problem, pack_step

Picture = np.ndarray | bytes | Path
LOST = (ConnectionClosed, InvalidHandshake, OSError, EOFError, TimeoutError)
SOCKET_OPTIONS: dict[str, Any] = {"compression": None, "open_timeout": 10, "max_size": 2**24, "proxy": None}
REPLY_S = 90.0
"""Longer than the server waits for a model replica before it says so itself."""


class Lockstep:
    """What to send and what an answer means, whatever the transport: one step at a time, never lost, never twice."""

    def __init__(self, step: int, retry_s: float) -> None:
        self.step, self.retry_s = step, retry_s
        self.wanted: tuple[int, int] | None = None
        self.frame: FrameMessage | None = None
        self._attempt, self._give_up_at = 0, 0.0

    def ask(self, action: int) -> bytes:
        """The message for the next step."""
        if not 0 <= action < 256:
            raise Problem(422, "action-out-of-range", f"action {action} does not fit a byte")
        self.wanted = (self.step + 1, action)
        self._attempt, self._give_up_at = 0, time.monotonic() + self.retry_s
        return self.again()

    def again(self) -> bytes:
        """The message of the step under way."""
        if self.wanted is None:
            raise ValueError("no step is under way")
        return pack_step(*self.wanted)

    def take(self, message: str | bytes) -> tuple[bool, bool]:
        """Reads what came: whether it settles the step under way, and whether that must be asked for again."""
        if isinstance(message, str):
            return False, False
        frame = FrameMessage.unpack(message)
        self.step, self.frame, self._attempt = frame.step, frame, 0
        settled = self.wanted is None or frame.step >= self.wanted[0]
        if settled:
            self.wanted = None
        return settled, not settled and bool(frame.flags & Flag.GREETING)

    def pause_s(self, error: BaseException) -> float:
        """How long to wait before reconnecting.

        Raises:
            Problem: the server refused, or stayed away for too long.
        """
        code = error.rcvd.code if isinstance(error, ConnectionClosed) and error.rcvd else 1006
        reason = error.rcvd.reason if isinstance(error, ConnectionClosed) and error.rcvd else str(error)
        if 4400 <= code < 4500 and code not in (4408, 4429):
            raise Problem(code - 4000, "refused", reason) from error
        if time.monotonic() > self._give_up_at:
            raise Problem(503, "no-server", f"no connection for {self.retry_s:g} s: {reason or code}") from error
        self._attempt += 1
        base = 2.0 if code in (4429, 4503) else 0.05
        return min(5.0, base * 2 ** min(self._attempt - 1, 8)) * random.uniform(0.5, 1.0)


class Described:
    """What both kinds of player know about their session."""

    def __init__(self, about: dict[str, Any], retry_s: float) -> None:
        self.about, self.id, self.token = about, str(about["session"]), str(about["token"])
        self.actions, self.seed, self.model = int(about["actions"]), int(about["seed"]), str(about["model"])
        self.reconnects = 0
        self.lockstep = Lockstep(int(about["step"]), retry_s)

    @property
    def step_number(self) -> int:
        """The newest step that is known to be committed."""
        return self.lockstep.step

    @property
    def message(self) -> FrameMessage | None:
        """The newest frame's message, with the server's timings."""
        return self.lockstep.frame

    def address(self, base: str) -> tuple[str, dict[str, Any]]:
        """URL and options of the session's socket."""
        url = f"{base.replace('http', 'ws', 1)}/v1/sessions/{self.id}/play"
        return url, {"subprotocols": [SUBPROTOCOL, TOKEN_PREFIX + self.token], **SOCKET_OPTIONS}

    def pixels(self) -> np.ndarray:
        """The newest frame, uint8 (H, W, 3)."""
        if self.lockstep.frame is None:
            raise ValueError("no frame has come yet")
        return decode_jpeg(self.lockstep.frame.jpeg)


def create_body(picture: Picture | Sequence[Picture] | None, **given: str | int | None) -> dict[str, Any]:
    """The multipart body of a new session."""
    if picture is None:
        pictures: list[Picture] = []
    elif isinstance(picture, np.ndarray):
        pictures = list(picture) if picture.ndim == 4 else [picture]
    else:
        pictures = [picture] if isinstance(picture, (bytes, Path)) else list(picture)
    fields = [(name, (None, str(value))) for name, value in given.items() if value is not None]
    return {"files": [*fields, *(("picture", ("prompt", _picture_bytes(p))) for p in pictures)] or {"": (None, "")}}


def rollout_body(session: str, actions_NT: Sequence[Sequence[int]] | np.ndarray, step: int | None) -> dict[str, Any]:
    """The JSON body of a rollout request."""
    return {"session": session, "step": step, "actions": np.asarray(actions_NT).tolist()}


def rollout_frames(answer: httpx.Response) -> np.ndarray:
    """What a rollout request answers as pixels, uint8 (N, T, H, W, 3)."""
    return np.stack([[decode_jpeg(base64.b64decode(jpeg)) for jpeg in row] for row in answer.json()["frames"]])


def _picture_bytes(picture: Picture) -> bytes:
    if isinstance(picture, np.ndarray):
        return cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1].tobytes()
    return picture if isinstance(picture, bytes) else picture.read_bytes()


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Tells of a server that can't be reached as of one that refuses."""
    try:
        yield
    except httpx.TransportError as error:
        raise Problem(503, "no-server", f"no answer from {url} ({error})", retry_after_s=1) from error


def checked(answer: httpx.Response) -> httpx.Response:
    """The answer, unless it is a refusal: that is raised as a Problem."""
    if answer.is_error:
        if "problem+json" in answer.headers.get("content-type", ""):
            raise Problem.from_body(answer.json())
        raise Problem(answer.status_code, "no-server", f"the server answered {answer.status_code}", retry_after_s=1)
    return answer
