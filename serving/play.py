"""The play socket: actions up, frames down, in lockstep, with the newest action winning.

Up: 5 bytes (u32 step, u8 action). Down: `FrameMessage`, and JSON text: `{"state": "resuming" | "live"}` while a model
replica is being replaced, `{"state": "queued", "position": 3}` while all places of the gateway are taken. A player may
send the next action before the frame of the last has come, one step ahead; of several messages only the newest counts.
Refusals close with 4000 + the HTTP status (protocol.Problem).
"""

import asyncio
import json
import time

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from serving.config import Limits
from serving.edge import close_reason
from serving.line import Line
from serving.protocol import SUBPROTOCOL, TOKEN_PREFIX, Flag, Problem, unpack_step
from serving.session import Sessions
from serving.store import Session

IDLE = Problem(408, "idle", "nothing was played for a while: reconnect to go on")


class PlaySocket:
    """One player's connection.

    Args:
        socket: not accepted yet.
        sessions: the sessions of this gateway.
        limits: bounds on clients.
    """

    def __init__(self, socket: WebSocket, sessions: Sessions, limits: Limits) -> None:
        self.socket, self.sessions, self.limits = socket, sessions, limits
        self._latest: tuple[int, int] | None = None
        self._arrived = asyncio.Event()
        self._allowance = _Allowance(limits.messages_per_s)
        self._next_at = 0.0

    async def serve(self, session_id: str, line: Line) -> None:
        """Plays until the player leaves, or something is refused.

        Args:
            session_id: from the URL.
            line: the places of this gateway; while they are taken the player is told its position.
        """
        offered = [p.strip() for p in self.socket.headers.get("sec-websocket-protocol", "").split(",")]
        token = next((p[len(TOKEN_PREFIX) :] for p in offered if p.startswith(TOKEN_PREFIX)), None)
        await self.socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        try:
            if SUBPROTOCOL not in offered:
                raise Problem(400, "bad-subprotocol", f"offer the subprotocols {SUBPROTOCOL} and {TOKEN_PREFIX}<token>")
            self.sessions.open(session_id, token)
            async with line.place(self._tell_position):
                session = self.sessions.attach(self.sessions.open(session_id, token))
                with self.sessions.playing(session):
                    await self._play(session)
        except Problem as problem:
            await self._close(problem)
        except WebSocketDisconnect:
            pass

    async def _play(self, session: Session) -> None:
        """Reader and stepper side by side: a message is taken in at once, so nothing piles up behind a slow step."""
        greeting = self.sessions.stored(session, session.step, Flag.GREETING)
        await self.socket.send_bytes(greeting.pack())
        reader = asyncio.create_task(self._read(self.sessions.worlds[session.model].info.actions))
        stepper = asyncio.create_task(self._step(session))
        try:
            done, _ = await asyncio.wait((reader, stepper), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (reader, stepper):
                task.cancel()
            await asyncio.gather(reader, stepper, return_exceptions=True)

    async def _read(self, actions: int) -> None:
        """Keeps the newest action.

        Raises:
            Problem: a message that breaks the protocol, too many of them, or none for too long.
        """
        while True:
            try:
                async with asyncio.timeout(self.limits.idle_s):  # unlike wait_for it makes no task of every message
                    message = await self.socket.receive()
            except TimeoutError:
                raise IDLE from None
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1006))
            self._allowance.take()
            if message.get("bytes") is None:
                raise Problem(400, "bad-message", "a step is a binary message of 5 bytes, got text")
            if self._latest is not None:
                self.sessions.metrics.dropped()
            self._latest = unpack_step(message["bytes"], actions)
            self._arrived.set()

    async def _step(self, session: Session) -> None:
        """Takes the newest action when the last step is done and the session's pace allows."""
        while True:
            await self._arrived.wait()
            await asyncio.sleep(self._next_at - time.monotonic())
            self._arrived.clear()
            latest, self._latest = self._latest, None
            if latest is None:
                continue
            self._next_at = time.monotonic() + 1 / self.limits.steps_per_s
            session, frame = await self.sessions.step(session, *latest, self._tell)
            await self.socket.send_bytes(frame.pack())

    async def _tell(self, state: str) -> None:
        await self.socket.send_text(json.dumps({"state": state}))

    async def _tell_position(self, position: int) -> None:
        await self.socket.send_text(json.dumps({"state": "queued", "position": position}))

    async def _close(self, problem: Problem) -> None:
        self.sessions.metrics.rejected(problem.slug)
        if self.socket.application_state is WebSocketState.CONNECTED:
            await self.socket.close(problem.close_code, close_reason(problem))


class _Allowance:
    """A token bucket: `rate` messages a second, bursts of twice as many."""

    def __init__(self, rate: float) -> None:
        self.rate, self.left, self.at = rate, 2 * rate, time.monotonic()

    def take(self) -> None:
        """Counts a message; 429 when there are too many."""
        now = time.monotonic()
        self.left = min(2 * self.rate, self.left + (now - self.at) * self.rate) - 1
        self.at = now
        if self.left < 0:
            raise Problem(429, "too-many-messages", f"more than {self.rate:g} messages a second", retry_after_s=1)
