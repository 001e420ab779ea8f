"""Python clients of a served world, sync and async.

    with WorldClient("http://127.0.0.1:8000") as client, client.create(gallery="0") as player:
        frame = player.step(action=2)      # uint8 (H, W, 3)

A player survives killed replicas and gateways: it reconnects and asks for the same step again, which the server takes
exactly once.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import ClientConnection as SyncConnection
from websockets.sync.client import connect as connect_sync

from serving.pictures import decode_jpeg
from serving.protocol import SUBPROTOCOL, TOKEN_PREFIX, Flag, FrameMessage, Problem, pack_step

Picture = np.ndarray | bytes | Path
LOST = (ConnectionClosed, InvalidHandshake, OSError, EOFError, TimeoutError)
SOCKET_OPTIONS: dict[str, Any] = {"compression": None, "open_timeout": 10, "max_size": 2**24, "proxy": None}
REPLY_S = 90.0
"""Longer than the server waits for a model replica before it says so itself."""


class _Lockstep:
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


class _Described:
    """What both kinds of player know about their session."""

    def __init__(self, about: dict[str, Any], retry_s: float) -> None:
        self.about, self.id, self.token = about, str(about["session"]), str(about["token"])
        self.actions, self.seed, self.model = int(about["actions"]), int(about["seed"]), str(about["model"])
        self.reconnects = 0
        self._lockstep = _Lockstep(int(about["step"]), retry_s)

    @property
    def step_number(self) -> int:
        """The newest step that is known to be committed."""
        return self._lockstep.step

    @property
    def message(self) -> FrameMessage | None:
        """The newest frame's message, with the server's timings."""
        return self._lockstep.frame

    def _address(self, base: str) -> tuple[str, dict[str, Any]]:
        url = f"{base.replace('http', 'ws', 1)}/v1/sessions/{self.id}/play"
        return url, {"subprotocols": [SUBPROTOCOL, TOKEN_PREFIX + self.token], **SOCKET_OPTIONS}

    def _pixels(self) -> np.ndarray:
        if self._lockstep.frame is None:
            raise ValueError("no frame has come yet")
        return decode_jpeg(self._lockstep.frame.jpeg)


class Player(_Described):
    """One session, played step by step over a socket. Not for several threads."""

    def __init__(self, client: "WorldClient", about: dict[str, Any]) -> None:
        super().__init__(about, client.retry_s)
        self._client = client
        self._socket: SyncConnection | None = None

    def step(self, action: int) -> np.ndarray:
        """Takes an action; the next frame, uint8 (H, W, 3).

        Raises:
            Problem: the server refused, or no server answered for the client's `retry_s`.
        """
        message = self._lockstep.ask(action)
        while True:
            try:
                if self._socket is None:
                    url, options = self._address(self._client.url)
                    self._socket = connect_sync(url, **options)  # its greeting says whether to ask
                else:
                    self._socket.send(message)
                while self._lockstep.wanted:
                    if self._lockstep.take(self._socket.recv(REPLY_S))[1]:
                        self._socket.send(self._lockstep.again())
                return self._pixels()
            except LOST as error:
                self.close()
                time.sleep(self._lockstep.pause_s(error))
                self.reconnects += 1

    def fork(self, step: int | None = None) -> "Player":
        """A new session that shares the past up to a step (the newest by default)."""
        body: dict[str, int] = {} if step is None else {"step": step}
        return Player(self._client, self._call("POST", "/fork", json=body).json()["sessions"][0])

    def frame(self, step: int) -> np.ndarray:
        """A committed frame, uint8 (H, W, 3)."""
        return decode_jpeg(self._call("GET", f"/frames/{step}.jpg").content)

    def history(self) -> dict[str, Any]:
        """The session and all its actions."""
        return self._call("GET", "/history").json()

    def replay(self, steps: int = 100) -> dict[str, Any]:
        """Has the server compute the session again and compare."""
        return self._call("POST", f"/replay?steps={steps}").json()

    def export(self) -> bytes:
        """The session as an mp4 video."""
        return self._call("GET", "/export.mp4").content

    def delete(self) -> None:
        """Removes the session."""
        self.close()
        self._call("DELETE", "")

    def close(self) -> None:
        """Leaves; the session stays."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._client.call(method, f"/v1/sessions/{self.id}{path}", token=self.token, **options)


class WorldClient:
    """Creates and resumes sessions of a served world.

    Args:
        url: such as http://127.0.0.1:8000.
        key: API key, where the server asks for one.
        retry_s: how long a step outlives a server that is away.
    """

    def __init__(self, url: str, key: str | None = None, retry_s: float = 60.0) -> None:
        self.url, self.key, self.retry_s = url.rstrip("/"), key, retry_s
        self._http = httpx.Client(base_url=self.url, timeout=REPLY_S, trust_env=False)

    def models(self) -> list[dict[str, Any]]:
        """The served worlds, the default first."""
        return self.call("GET", "/v1/models").json()["models"]

    def create(
        self,
        picture: Picture | Sequence[Picture] | None = None,
        *,
        gallery: str | None = None,
        seed: int | None = None,
        model: str | None = None,
    ) -> Player:
        """A new session from a picture (or several consecutive frames) or a gallery id."""
        return Player(self, self.call("POST", "/v1/sessions", **_create(picture, gallery, seed, model)).json())

    def resume(self, session: str, token: str) -> Player:
        """Goes on with a session."""
        return Player(self, {**self.call("GET", f"/v1/sessions/{session}", token=token).json(), "token": token})

    def call(self, method: str, path: str, token: str | None = None, **options: Any) -> httpx.Response:
        """One request; its refusal is raised as a Problem."""
        bearer = token or self.key
        headers = {"authorization": f"Bearer {bearer}"} if bearer else {}
        with _reaching(self.url):
            return _checked(self._http.request(method, path, headers=headers, **options))

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> "WorldClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncPlayer(_Described):
    """One session for asyncio programs; the same promises as `Player`."""

    def __init__(self, url: str, about: dict[str, Any], retry_s: float = 60.0) -> None:
        super().__init__(about, retry_s)
        self.url = url.rstrip("/")
        self._socket: ClientConnection | None = None

    @classmethod
    async def create(
        cls,
        url: str,
        picture: Picture | Sequence[Picture] | None = None,
        *,
        gallery: str | None = None,
        seed: int | None = None,
        model: str | None = None,
        key: str | None = None,
        retry_s: float = 60.0,
    ) -> "AsyncPlayer":
        """A new session; see `WorldClient.create`."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with _reaching(url):
            async with httpx.AsyncClient(timeout=REPLY_S, headers=headers, trust_env=False) as http:
                answer = await http.post(f"{url.rstrip('/')}/v1/sessions", **_create(picture, gallery, seed, model))
        return cls(url, _checked(answer).json(), retry_s)

    async def step(self, action: int) -> np.ndarray:
        """Takes an action; the next frame. See `Player.step`."""
        message = self._lockstep.ask(action)
        while True:
            try:
                if self._socket is None:
                    url, options = self._address(self.url)
                    self._socket = await connect_async(url, **options)
                else:
                    await self._socket.send(message)
                while self._lockstep.wanted:
                    if self._lockstep.take(await asyncio.wait_for(self._socket.recv(), REPLY_S))[1]:
                        await self._socket.send(self._lockstep.again())
                return self._pixels()
            except LOST as error:
                await self.close()
                await asyncio.sleep(self._lockstep.pause_s(error))
                self.reconnects += 1

    async def close(self) -> None:
        """Leaves; the session stays."""
        if self._socket is not None:
            with suppress(*LOST):
                await self._socket.close()
            self._socket = None


def _create(
    picture: Picture | Sequence[Picture] | None, gallery: str | None, seed: int | None, model: str | None
) -> dict[str, Any]:
    """The multipart body of a new session."""
    if picture is None:
        pictures: list[Picture] = []
    elif isinstance(picture, np.ndarray):
        pictures = list(picture) if picture.ndim == 4 else [picture]
    else:
        pictures = [picture] if isinstance(picture, (bytes, Path)) else list(picture)
    given = {"gallery": gallery, "seed": seed, "model": model}
    fields = [(name, (None, str(value))) for name, value in given.items() if value is not None]
    return {"files": [*fields, *(("picture", ("prompt", _picture_bytes(p))) for p in pictures)] or {"": (None, "")}}


def _picture_bytes(picture: Picture) -> bytes:
    if isinstance(picture, np.ndarray):
        return cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1].tobytes()
    return picture if isinstance(picture, bytes) else picture.read_bytes()


@contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Tells of a server that can't be reached as of one that refuses."""
    try:
        yield
    except httpx.TransportError as error:
        raise Problem(503, "no-server", f"no answer from {url} ({error})", retry_after_s=1) from error


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        if "problem+json" in answer.headers.get("content-type", ""):
            raise Problem.from_body(answer.json())
        raise Problem(answer.status_code, "no-server", f"the server answered {answer.status_code}", retry_after_s=1)
    return answer
