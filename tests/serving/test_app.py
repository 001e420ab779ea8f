"""The whole application on Ray Serve: two tiers, and what is left when a process of one is killed."""

import logging
import socket

import httpx
import numpy as np
import pytest

from infra.config import UserError
from serving.app import serve_world
from serving.client import WorldClient
from serving.config import ServeConfig
from tests.serving.conftest import (
    SAMPLER,
    SIZE,
    picture,
    uninterrupted,
)

log = logging.getLogger(__name__)


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


def test_colocated_gateways_play_the_same_world(served_home, ray_cluster, world, tmp_path):
    config = ServeConfig(
        home=served_home.path, world="toy", port=0, store=str(tmp_path / "db"), colocated=True, slots=2, sampler=SAMPLER
    )
    acts, prompt = [3, 1, 4, 1, 0, 2, 2], picture(6, SIZE, SIZE)
    with serve_world(config) as served:
        with WorldClient(served.url) as client, client.create(prompt, seed=2) as player:
            frames = [player.step(a) for a in acts]
        assert httpx.get(f"{served.url}/readyz").json() == {"status": "ready", "models": ["toy@v1"]}
    assert all(np.array_equal(a, b) for a, b in zip(frames, uninterrupted(world, prompt, 2, acts), strict=True))


def test_a_taken_port_and_a_missing_world_are_one_clear_sentence(served_home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port} .* --port"):
            serve_world(ServeConfig(home=served_home.path, world="toy", port=port))
    with pytest.raises(UserError, match="did you mean toy"):
        serve_world(ServeConfig(home=served_home.path, world="toi", port=0))
