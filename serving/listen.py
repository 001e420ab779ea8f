"""A gateway's own port: on one machine players reach a gateway itself, and no proxy takes a share of every step.

Gateways share the port (SO_REUSEPORT): the kernel spreads connections over those that live, so that players of a killed
one reconnect to another at once. On a cluster Ray Serve's proxies find the gateways instead (`serving/app.py`).
"""

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.config import ServeConfig

MESSAGE_BYTES = 2**17
"""Largest message of a play socket that is taken in at all; a step has 5 bytes."""


class Impatient(HttpToolsProtocol):
    """HTTP whose clients must come to the point: uvicorn's keep-alive ends with the first byte of the next headers, and
    before a first request it has none."""

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._look_again()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    @override
    def handle_websocket_upgrade(self) -> None:
        self._timer.cancel()
        super().handle_websocket_upgrade()

    def _look_again(self) -> None:
        self._timer = self.loop.call_later(self.timeout_keep_alive, self._look, self.cycle)

    def _look(self, before: RequestResponseCycle | None) -> None:
        """Closes a connection that has not begun a request since the last look, and has none under way."""
        if self.cycle is before and (before is None or before.response_complete):
            self.transport.close()
        else:
            self._look_again()


def server(app: ASGIApp, connection_s: int) -> uvicorn.Server:
    """The server under the application, with Ray or without.

    Args:
        app: the doors.
        connection_s: a connection on which nothing is asked for this long is closed.
    """
    config = uvicorn.Config(
        app,
        http=Impatient,
        ws="websockets-sansio",
        timeout_keep_alive=connection_s,
        ws_max_size=MESSAGE_BYTES,
        ws_per_message_deflate=False,  # browsers ask for it; frames are JPEG
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
    )
    return uvicorn.Server(config)


async def listen(app: ASGIApp, config: ServeConfig) -> None:
    """Serves on a port that other gateways of this machine may share, until it is cancelled.

    Raises:
        OSError: the port is taken by something else.
    """
    port = socket.create_server((config.host, config.port), reuse_port=True)
    await server(app, config.limits.connection_s).serve([port])
