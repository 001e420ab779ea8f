"""Clients that mean harm, against doors in a process of their own: memory holds, and others play on."""

import base64
import concurrent.futures
import contextlib
import json
import socket as sockets
import struct
import time
import zlib
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from serving.client import WorldClient
from serving.protocol import pack_step
from tests.serving.apart import apart
from tests.serving.conftest import picture
from tests.serving.test_gateway import JSON, closed_with, create, socket
from tests.serving.test_pictures import encoded, png

LARGEST = 4000 * 4000 * 3 * 8 / 2**20
"""Megabytes that the largest allowed pictures take while `creates_at_once` of them are decoded."""


@pytest.fixture(scope="module")
def doors(served_home):
    with apart(served_home) as doors:
        for _ in range(2):  # what is allocated once
            httpx.post(f"{doors.url}/v1/sessions", files={"picture": encoded(picture())})
        yield doors


@pytest.fixture(autouse=True)
def others_play_on(doors):
    """Whatever happens in a test, a session that was there before goes on, and memory comes back."""
    with WorldClient(doors.url) as client, client.create(gallery="0", seed=1) as player:
        player.step(1)
        before = doors.megabytes("VmRSS")
        yield
        player.step(2)
        assert player.replay()["equal"]
        assert doors.megabytes("VmRSS") - before < 150, "megabytes"


def real_bomb(side):
    """A PNG whose every pixel is there: small to send, `3 * side ** 2` bytes when decoded."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_bombs_cost_nothing(doors):
    bomb = real_bomb(16000)
    assert len(bomb) < 2**20
    doors.forget_peak()
    before = doors.megabytes()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        send = lambda _: httpx.post(f"{doors.url}/v1/sessions", files={"picture": bomb}, timeout=60)  # noqa: E731
        assert {answer.status_code for answer in pool.map(send, range(16))} == {413}
    assert doors.megabytes() - before < 60, "megabytes"


def test_the_largest_pictures_are_decoded_a_few_at_a_time(doors):
    largest = real_bomb(4000)
    doors.forget_peak()
    before = doors.megabytes()
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        send = lambda _: httpx.post(f"{doors.url}/v1/sessions", files={"picture": largest}, timeout=120)  # noqa: E731
        assert {answer.status_code for answer in pool.map(send, range(24))} == {201}
    assert doors.megabytes() - before < 3 * LARGEST, "some copies of each"


def test_bodies_that_lie_about_their_length_are_cut_off(doors):
    before = doors.megabytes("VmRSS")
    for _ in range(4):
        chunks = (bytes(2**20) for _ in range(64))
        with contextlib.suppress(httpx.TransportError):  # cut off in the middle of sending, or answered
            assert httpx.post(f"{doors.url}/v1/sessions", content=chunks, headers=JSON).status_code == 413
    assert doors.megabytes("VmRSS") - before < 40, "megabytes"


def test_a_nested_or_endless_document_is_refused(doors):
    for body in (b"[" * 2**20, b'{"a":' * 10**5, b'{"seed":' + b"9" * 2**20 + b"}", b'{"picture":"' + b"A" * 2**22):
        answer = httpx.post(f"{doors.url}/v1/sessions", content=body, headers=JSON, timeout=30)
        assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    huge = {"session": "x", "actions": [[0] * 4096] * 200}
    assert httpx.post(f"{doors.url}/v1/rollouts", json=huge).status_code == 401, "the token is asked for first"


def test_ten_thousand_messages_a_second_are_cut_off(doors):
    with httpx.Client(base_url=doors.url) as http:
        made = [create(http).json() for _ in range(4)]
    doors.forget_peak()
    before = doors.megabytes()

    def flood(session):
        with socket(doors.url, session) as ws:
            return closed_with(ws, [pack_step(1, 0)] * 10_000)[0]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert set(pool.map(flood, made)) == {4429}
    assert doors.megabytes() - before < 40, "megabytes"


def test_who_never_reads_costs_no_memory(doors):
    """Sockets that ask and never read: frames stop at the kernel's buffers, and asking on is refused."""
    with httpx.Client(base_url=doors.url) as http:
        made = [create(http).json() for _ in range(4)]
    doors.forget_peak()
    before = doors.megabytes()

    def ask(session):
        with socket(doors.url, session, max_queue=1, close_timeout=0.2) as ws, contextlib.suppress(ConnectionClosed):
            for n in range(1, 3000):
                ws.send(pack_step(n, 0))
                time.sleep(0.001)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, made))
    assert doors.megabytes() - before < 60, "megabytes"


def test_idle_connections_and_half_handshakes_stop_nobody(doors):
    address = urlsplit(doors.url)
    with contextlib.ExitStack() as stack:
        for i in range(200):
            held = stack.enter_context(sockets.create_connection((address.hostname, address.port), 10))
            if i % 2:
                held.sendall(b"GET /v1/sessions/x/play HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n")
        assert httpx.get(f"{doors.url}/healthz", timeout=20).json()["status"] == "ok"


def test_steps_over_rest_are_paced_and_then_refused(doors):
    with httpx.Client(base_url=doors.url, timeout=60) as http:
        made = create(http).json()
        path, headers = f"/v1/sessions/{made['session']}/step", {"authorization": f"Bearer {made['token']}"}
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            ask = lambda n: httpx.post(doors.url + path, json={"n": 1, "action": 0}, headers=headers)  # noqa: E731
            answers = list(pool.map(ask, range(120)))
        assert {a.status_code for a in answers} <= {200, 429}
        began = time.perf_counter()
        for n in range(2, 32):
            assert http.post(path, json={"n": n, "action": 0}, headers=headers).status_code in (200, 429)
        assert time.perf_counter() - began > 29 / 60 * 0.9, "60 steps a second of one session"


def test_frames_that_cannot_be_shapes_are_refused_one_by_one(doors):
    bad = [png(60000, 1), png(1, 1), png(0, 0), b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(99)]
    texts = [base64.b64encode(data).decode() for data in bad]
    for text in [*texts, "http://127.0.0.1:22/", "file:///etc/passwd"]:
        answer = httpx.post(f"{doors.url}/v1/sessions", json={"picture": text})
        assert answer.status_code in (413, 415, 422)
        assert json.loads(answer.text)["detail"]
