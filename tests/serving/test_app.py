"""The whole application on Ray Serve: two tiers, and what is left when a process of one is killed."""

import socket
import tempfile
from pathlib import Path

import httpx
import numpy as np
import pytest

from infra.config import UserError
from serving.app import serve_world
from serving.client import WorldClient
from serving.config import ServeConfig
from tests.serving.conftest import SIZE, picture, uninterrupted
from tests.serving.fabric import Fabric


def test_a_world_is_served_and_plays_as_it_does_alone(served, world):
    acts, prompt = [1, 4, 2, 2, 0, 3, 1, 1, 0, 2], picture(5, SIZE, SIZE)
    with WorldClient(served.url) as client, client.create(prompt, seed=21) as player:
        frames = [player.step(a) for a in acts]
        assert player.replay()["equal"]
    assert all(np.array_equal(a, b) for a, b in zip(frames, uninterrupted(world, prompt, 21, acts), strict=True))


def test_the_edge_holds_behind_serves_proxy(served):
    assert httpx.get(f"{served.url}/readyz").json()["models"] == ["toy@v1"]
    assert "<title>Lampworks</title>" in httpx.get(served.url).text
    chunks = (bytes(2**20) for _ in range(9))
    answer = httpx.post(f"{served.url}/v1/sessions", content=chunks, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["limit_bytes"] == 8 * 2**20
    assert httpx.get(f"{served.url}/v1/models", headers={"origin": "https://evil.example"}).status_code == 403


def plays(url, world, number):
    """A session whose frames are those of the world alone, by every kind of door."""
    acts, prompt = [3, 1, 4, 1, 0, 2, 2], picture(number, SIZE, SIZE)
    with WorldClient(url) as client, client.create(prompt, seed=number) as player:
        frames = [player.step(a) for a in acts]
        assert player.history()["history"] == [-1, *acts]
        assert "<title>Lampworks</title>" in httpx.get(url).text
        assert httpx.get(f"{url}/readyz").json() == {"status": "ready", "models": ["toy@v1"]}
    return all(np.array_equal(a, b) for a, b in zip(frames, uninterrupted(world, prompt, number, acts), strict=True))


def test_colocated_gateways_share_the_port_and_one_may_die(served_home, world, tmp_path):
    """On one machine no proxy is needed: who reconnects after a kill reaches the other gateway, which plays on."""
    with Fabric(served_home, tmp_path, colocated=True, gateways=2, slots=4) as fabric:
        assert plays(fabric.url, world, 6)
        count = fabric.ask("count")
        assert (count["gateway"], count["model"], count["fleet"], count["proxy"]) == (2, 0, 0, 0)
        acts, prompt = [1, 3, 0, 2] * 3, picture(9, SIZE, SIZE)
        with WorldClient(fabric.url) as client, client.create(prompt, seed=4) as player:
            frames = []
            for i, action in enumerate(acts):
                frames.append(player.step(action))
                if i in (3, 7):  # one of the two, and of the two that are there a moment later
                    fabric.kill("gateway")
            assert player.replay()["equal"]
        assert all(np.array_equal(a, b) for a, b in zip(frames, uninterrupted(world, prompt, 4, acts), strict=True))


@pytest.fixture
def sockets():
    """A folder with a name short enough for a Unix socket in it."""
    with tempfile.TemporaryDirectory(prefix="lw", dir="/tmp") as folder:
        yield Path(folder)


def test_the_same_behind_haproxy(served_home, world, tmp_path, sockets):
    """As a deployment on a cluster would: the variables are read when Serve's processes start."""
    environ = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(sockets / "h.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(sockets / "h.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(sockets),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(sockets / "state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # nobody plays when it ends
    }
    with Fabric(served_home, tmp_path, environ=environ, proxy=True, gateways=2, slots=2) as fabric:
        assert plays(fabric.url, world, 7)
        assert [p for p in sockets.rglob("h.cfg") if "bind" in p.read_text()], "HAProxy is what answers"
        assert httpx.post(f"{fabric.url}/v1/sessions", content=bytes(9 * 2**20)).status_code == 413


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_taken_port_and_a_missing_world_are_one_clear_sentence(served_home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port} .* --port"):
            serve_world(ServeConfig(home=served_home.path, world="toy", port=port))
    with pytest.raises(UserError, match="did you mean toy"):
        serve_world(ServeConfig(home=served_home.path, world="toi", port=0))
