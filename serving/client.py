"""Python clients of a served world, sync and async.

    with WorldClient("http://127.0.0.1:8000") as client, client.create(gallery="0") as player:
        frame = player.step(action=2)      # uint8 (H, W, 3)

A player survives killed replicas and gateways: it reconnects and asks for the same step again, which the server takes
exactly once.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_async
from websockets.sync.client import ClientConnection as SyncConnection
from websockets.sync.client import connect as connect_sync

from serving.lockstep import (
    LOST,
    REPLY_S,
    Described,
    Picture,
    checked,
    create_body,
    reaching,
    rollout_body,
    rollout_frames,
)
from serving.pictures import decode_jpeg
from serving.protocol import Problem

__all__ = ["AsyncPlayer", "Picture", "Player", "Problem", "WorldClient"]


class Player(Described):
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
        message = self.lockstep.ask(action)
        while True:
            try:
                if self._socket is None:
                    url, options = self.address(self._client.url)
                    self._socket = connect_sync(url, **options)  # its greeting says whether to ask
                else:
                    self._socket.send(message)
                while self.lockstep.wanted:
                    if self.lockstep.take(self._socket.recv(REPLY_S))[1]:
                        self._socket.send(self.lockstep.again())
                return self.pixels()
            except LOST as error:
                self.close()
                time.sleep(self.lockstep.pause_s(error))
                self.reconnects += 1

    def fork(self, step: int | None = None) -> "Player":
        """A new session that shares the past up to a step (the newest by default)."""
        body: dict[str, int] = {} if step is None else {"step": step}
        return Player(self._client, self._call("POST", "/fork", json=body).json()["sessions"][0])

    def rollouts(self, actions_NT: Sequence[Sequence[int]] | np.ndarray, step: int | None = None) -> np.ndarray:
        """Where rows of actions would lead from a step (the newest by default), all of one length T.

        The session stays where it is; playing a row of actions in it shows these very frames.

        Returns:
            uint8 (N, T, H, W, 3).
        """
        body = rollout_body(self.id, actions_NT, step)
        return rollout_frames(self._client.call("POST", "/v1/rollouts", token=self.token, json=body))

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
        title: str | None = None,
    ) -> Player:
        """A new session from a picture (or several consecutive frames) or a gallery id; `title` is what the world is
        told about itself, if it was trained with titles."""
        body = create_body(picture, gallery=gallery, seed=seed, model=model, title=title)
        return Player(self, self.call("POST", "/v1/sessions", **body).json())

    def resume(self, session: str, token: str) -> Player:
        """Goes on with a session."""
        return Player(self, {**self.call("GET", f"/v1/sessions/{session}", token=token).json(), "token": token})

    def call(self, method: str, path: str, token: str | None = None, **options: Any) -> httpx.Response:
        """One request; its refusal is raised as a Problem."""
        bearer = token or self.key
        headers = {"authorization": f"Bearer {bearer}"} if bearer else {}
        with reaching(self.url):
            return checked(self._http.request(method, path, headers=headers, **options))

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> "WorldClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncPlayer(Described):
    """One session for asyncio programs; the same promises and methods as `Player`."""

    def __init__(self, url: str, about: dict[str, Any], retry_s: float = 60.0, key: str | None = None) -> None:
        super().__init__(about, retry_s)
        self.url, self._key = url.rstrip("/"), key
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
        title: str | None = None,
        key: str | None = None,
        retry_s: float = 60.0,
    ) -> "AsyncPlayer":
        """A new session; see `WorldClient.create`."""
        body = create_body(picture, gallery=gallery, seed=seed, model=model, title=title)
        answer = await _request(url, key, "POST", "/v1/sessions", **body)
        return cls(url, answer.json(), retry_s, key)

    @classmethod
    async def resume(cls, url: str, session: str, token: str, retry_s: float = 60.0) -> "AsyncPlayer":
        """Goes on with a session."""
        about = (await _request(url, token, "GET", f"/v1/sessions/{session}")).json()
        return cls(url, {**about, "token": token}, retry_s)

    async def step(self, action: int) -> np.ndarray:
        """Takes an action; the next frame. See `Player.step`."""
        message = self.lockstep.ask(action)
        while True:
            try:
                if self._socket is None:
                    url, options = self.address(self.url)
                    self._socket = await connect_async(url, **options)
                else:
                    await self._socket.send(message)
                while self.lockstep.wanted:
                    if self.lockstep.take(await asyncio.wait_for(self._socket.recv(), REPLY_S))[1]:
                        await self._socket.send(self.lockstep.again())
                return self.pixels()
            except LOST as error:
                await self.close()
                await asyncio.sleep(self.lockstep.pause_s(error))
                self.reconnects += 1

    async def fork(self, step: int | None = None) -> "AsyncPlayer":
        """See `Player.fork`."""
        made = await self._call("POST", "/fork", json={} if step is None else {"step": step})
        return AsyncPlayer(self.url, made.json()["sessions"][0], self.lockstep.retry_s, self._key)

    async def rollouts(self, actions_NT: Sequence[Sequence[int]] | np.ndarray, step: int | None = None) -> np.ndarray:
        """See `Player.rollouts`."""
        body = rollout_body(self.id, actions_NT, step)
        return rollout_frames(await _request(self.url, self.token, "POST", "/v1/rollouts", json=body))

    async def frame(self, step: int) -> np.ndarray:
        """See `Player.frame`."""
        return decode_jpeg((await self._call("GET", f"/frames/{step}.jpg")).content)

    async def history(self) -> dict[str, Any]:
        """See `Player.history`."""
        return (await self._call("GET", "/history")).json()

    async def replay(self, steps: int = 100) -> dict[str, Any]:
        """See `Player.replay`."""
        return (await self._call("POST", f"/replay?steps={steps}")).json()

    async def export(self) -> bytes:
        """See `Player.export`."""
        return (await self._call("GET", "/export.mp4")).content

    async def delete(self) -> None:
        """Removes the session."""
        await self.close()
        await self._call("DELETE", "")

    async def close(self) -> None:
        """Leaves; the session stays."""
        if self._socket is not None:
            with suppress(*LOST):
                await self._socket.close()
            self._socket = None

    async def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return await _request(self.url, self.token, method, f"/v1/sessions/{self.id}{path}", **options)


async def _request(url: str, bearer: str | None, method: str, path: str, **options: Any) -> httpx.Response:
    """One request of an asyncio program; its refusal is raised as a Problem."""
    headers = {"authorization": f"Bearer {bearer}"} if bearer else {}
    with reaching(url):
        async with httpx.AsyncClient(timeout=REPLY_S, headers=headers, trust_env=False) as http:
            return checked(await http.request(method, url.rstrip("/") + path, **options))
