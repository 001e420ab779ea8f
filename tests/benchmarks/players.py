"""Players that cost next to nothing: WebSocket frames written and read by hand, so that the server is what is measured.

A player asks for a step when the frame of the last has come. On the wire a masking key of zeros (RFC 6455, 5.3) leaves
the bytes as they are.
"""

import asyncio
import os
import struct
import time
from base64 import b64encode
from urllib.parse import urlsplit

import httpx
import numpy as np

ASK = struct.Struct("<2sIIB")
"""Final binary frame of 5 masked bytes, a masking key of zeros; step, action."""


class Player(asyncio.Protocol):
    """One session's socket."""

    def __init__(self, host, session):
        self.host, self.session, self.until = host, session, 0.0
        self.buffer, self.open, self.step = bytearray(), False, -1
        self.latencies, self.times = [], []
        self.asked_at, self.done = 0.0, asyncio.get_running_loop().create_future()
        self.greeted = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport
        key = b64encode(os.urandom(16)).decode()
        lines = (
            f"GET /v1/sessions/{self.session['session']}/play HTTP/1.1", f"Host: {self.host}", "Connection: Upgrade",
            "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}",
            f"Sec-WebSocket-Protocol: lampworks.v1, token.{self.session['token']}",
        )  # fmt: skip
        transport.write("\r\n".join((*lines, "\r\n")).encode())

    def data_received(self, data):
        self.buffer += data
        if not self.open:
            head, found, rest = bytes(self.buffer).partition(b"\r\n\r\n")
            if not found:
                return
            assert b" 101 " in head.split(b"\r\n")[0], head
            self.open, self.buffer = True, bytearray(rest)
        while (message := self._message()) is not None:
            self._got(message)

    def _message(self):
        b = self.buffer
        if len(b) < 2:
            return None
        size, start = b[1] & 127, 2
        if size >= 126:
            start = 4 if size == 126 else 10
            if len(b) < start:
                return None
            size = int.from_bytes(b[2:start], "big")
        if len(b) < start + size:
            return None
        kind, message = b[0] & 15, bytes(b[start : start + size])
        del b[: start + size]
        return kind, message

    def _got(self, found):
        kind, message = found
        if kind == 9:
            self.transport.write(struct.pack("<BBI", 0x8A, 0x80 | len(message), 0) + message)
        if kind == 8 and not self.done.done():
            self.done.set_exception(AssertionError(f"closed: {message!r}"))
        if kind != 2:
            return
        now, step = time.perf_counter(), struct.unpack_from("<I", message, 4)[0]
        if self.step < 0:
            self.step = step
            self.greeted.set_result(None)
            return
        assert step == self.step + 1, (step, self.step)
        self.latencies.append(now - self.asked_at)
        self.times.append(now)
        self.step = step
        if now < self.until:
            self.ask()
        elif not self.done.done():
            self.done.set_result(None)

    def ask(self):
        """Wants the next step."""
        self.asked_at = time.perf_counter()
        self.transport.write(ASK.pack(b"\x82\x85", 0, self.step + 1, self.step % 5))

    def connection_lost(self, error):
        if not self.done.done():
            self.done.set_exception(AssertionError(f"connection lost: {error}"))


async def play(url, model, sessions, seconds):
    """Frames/s of all players together, their median latency in seconds, and this process's share of a core."""
    address = urlsplit(url)
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        body = {"gallery": "0", "model": model, "seed": 1}
        made = [(await http.post("/v1/sessions", json=body)).raise_for_status().json() for _ in range(sessions)]
    players = []
    for session in made:
        make = lambda session=session: Player(address.netloc, session)  # noqa: E731
        players.append((await asyncio.get_running_loop().create_connection(make, address.hostname, address.port))[1])
    await asyncio.gather(*(player.greeted for player in players))
    began, cpu = time.perf_counter(), time.process_time()
    for player in players:
        player.until = began + seconds
        player.ask()
    await asyncio.gather(*(p.done for p in players))
    busy = (time.process_time() - cpu) / (time.perf_counter() - began)
    for player in players:
        player.transport.abort()
    rate = median_rate(np.concatenate([p.times for p in players]), began, began + seconds)
    return rate, float(np.median(np.concatenate([p.latencies for p in players]))), busy


def median_rate(times, began, ended):
    """Events a second: the median over five parts of the time, the first left out."""
    counts, edges = np.histogram(times, 6, (began, ended))
    return float(np.median(counts[1:]) / (edges[1] - edges[0]))
