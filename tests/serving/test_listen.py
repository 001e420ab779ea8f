"""A gateway's own port: shared among gateways, and closed to who says nothing."""

import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.sync.client import connect

from serving.config import ServeConfig
from serving.listen import listen
from tests.serving.conftest import listening

HALF = b"GET /v1/sessions/x/play HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
WHOLE = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


async def echo(scope, receive, send):
    """Answers HTTP when it has waited for the client's word, and sockets by what they say."""
    if scope["type"] == "http":
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": message["bytes"]})


@pytest.fixture(scope="module")
def url():
    with listening(echo, connection_s=1) as url:
        yield url


def closed_after(url, *parts):
    """What came, and how long after the last part the server closed the connection."""
    address, got = urlsplit(url), b""
    with socket.create_connection((address.hostname, address.port), 30) as held:
        for part in parts:
            held.sendall(part)
            time.sleep(0.1)
        began = time.monotonic()
        while data := held.recv(2**16):
            got += data
        return got, time.monotonic() - began


@pytest.mark.parametrize(
    "parts", [(), (b"GET",), (HALF,), (HALF, b"X-A: b\r\n")], ids=["nothing", "word", "half", "drip"]
)
def test_who_says_nothing_or_half_of_it_is_let_go(url, parts):
    got, waited = closed_after(url, *parts)
    assert got == b""
    assert waited > 0.3


def test_who_asked_once_and_then_half_is_let_go_too(url):
    got, _ = closed_after(url, WHOLE, HALF)
    assert got.startswith(b"HTTP/1.1 200")
    assert got.endswith(b"ok")


def test_a_slow_body_and_an_open_socket_are_no_idle_connections(url):
    """The doors have limits of their own for these (`body_s`, `idle_s`)."""

    def slowly():
        for _ in range(4):
            time.sleep(0.6)
            yield b"x"

    assert httpx.post(url, content=slowly(), timeout=30).text == "ok"
    with connect(url.replace("http", "ws"), proxy=None) as ws:
        assert not ws.protocol.extensions, "frames are JPEG: nothing is compressed again"
        time.sleep(2.5)
        ws.send(b"still here")
        assert ws.recv(timeout=20) == b"still here"


def test_a_port_of_someone_else_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        listen(echo, ServeConfig(port=taken.getsockname()[1])).send(None)
