"""The outermost layer by itself: what reaches the doors behind it."""

import asyncio

import pytest

from serving.config import ServeConfig
from serving.edge import SECURITY_HEADERS, Edge

PLAIN = [(b"host", b"127.0.0.1:8000")]


def through(headers, kind="http", method="GET", **settings):
    """What a request becomes: the scope that the doors behind the edge see (or None), and the answer's start."""
    seen, sent = [], []

    async def doors(scope, receive, send):
        seen.append(scope)
        if kind == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})

    async def receive():
        return {"type": "websocket.connect"} if kind == "websocket" else {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "method": method, "path": "/v1/models", "headers": [*PLAIN, *headers]}
    told = []
    asyncio.run(Edge(doors, ServeConfig(**settings), told.append)(scope, receive, send))
    assert len(told) == (not seen and method != "OPTIONS"), "every refusal is counted, and nothing else"
    return (seen[0] if seen else None), sent


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "name", [b"x-session-id", b"X-Session-ID", b"serve_multiplexed_model_id", b"serve-multiplexed-model-id",
             b"x-request-id", b"x-request-timeout-seconds", b"X-Request-Disconnect-Disabled"],
)  # fmt: skip
def test_headers_that_serve_obeys_do_not_get_through(kind, name):
    scope, _ = through([(name, b"1"), (b"accept", b"*/*")], kind)
    assert scope["headers"] == [*PLAIN, (b"accept", b"*/*")]


def test_every_answer_carries_the_policy_and_refusals_too():
    _, sent = through([])
    _, refused = through([(b"origin", b"https://evil.example")])
    for message in (sent[0], refused[0]):
        given = dict(message["headers"])
        assert all(given[name.encode()] == value.encode() for name, value in SECURITY_HEADERS.items())
    assert refused[0]["status"] == 403


@pytest.mark.parametrize(
    ("origin", "passes"),
    [
        (b"http://127.0.0.1:8000", True),
        (b"http://127.0.0.1:8001", False),
        (b"null", False),
        (b"https://friend.example", True),
        (b"https://friend.example.evil.example", False),
        (b"http://friend.example", False),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_origins_are_compared_whole(kind, origin, passes):
    scope, sent = through([(b"origin", origin)], kind, origins=("https://friend.example",))
    assert (scope is not None) is passes
    if kind == "websocket" and not passes:
        assert [m["type"] for m in sent] == ["websocket.accept", "websocket.close"]
        assert sent[1]["code"] == 4403


@pytest.mark.parametrize(
    ("host", "passes"),
    [(b"localhost", True), (b"[::1]:8000", True), (b"127.0.0.1.evil.example", False), (b"", False), (b"LOCALHOST", 1)],
)  # fmt: skip
def test_hosts_are_compared_whole(host, passes):
    async def doors(scope, receive, send):
        seen.append(scope)

    async def nothing(*message):
        return None

    seen = []
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", host)]}
    asyncio.run(Edge(doors, ServeConfig())(scope, nothing, nothing))
    assert bool(seen) == passes


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"0x10", b" 5", b"99999999999999999999"])
def test_strange_lengths_are_refused(length):
    scope, sent = through([(b"content-length", length)])
    assert scope is None
    assert sent[0]["status"] in (400, 413)
