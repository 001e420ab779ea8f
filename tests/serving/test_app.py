"""The whole application on Ray Serve: two tiers, and what is left when a process of one is killed."""

import asyncio
import logging
import os
import signal
import socket
import threading
import time

import httpx
import numpy as np
import pytest

from infra.config import Home, UserError
from serving.app import GatewayReplica, serve_world
from serving.client import AsyncPlayer, WorldClient
from serving.config import ServeConfig
from serving.pictures import decode_jpeg, encode_jpeg
from serving.store import SqliteStore, open_store
from tests.serving.conftest import (
    ACTIONS,
    GATEWAY,
    MODEL,
    SAMPLER,
    SIZE,
    gateway_of,
    listening,
    picture,
    replicas,
    running_redis,
    start_redis,
    stop,
)

log = logging.getLogger(__name__)


def uninterrupted(world, prompt, seed, actions):
    state, frames = world.start(prompt[None], seed, SAMPLER), []
    for action in actions:
        state, frame = world.step(state, action)
        frames.append(decode_jpeg(encode_jpeg(frame.numpy())))
    return frames


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


def test_colocated_gateways_play_the_same_world(served_home, world, tmp_path):
    """The replica that holds gateway and model at once, built as Serve builds it."""
    config = ServeConfig(
        home=served_home.path, world="toy", store=str(tmp_path / "db"), colocated=True, slots=2, sampler=SAMPLER
    )

    async def build():
        replica = GatewayReplica.__new__(GatewayReplica)
        await replica.__init__(config, {"toy@v1": served_home.artifacts / "toy" / "v1"})
        replica.check_health()
        return replica.__serve_build_asgi_app__()

    acts, prompt = [3, 1, 4, 1, 0, 2, 2], picture(6, SIZE, SIZE)
    with listening(asyncio.run(build())) as url, WorldClient(url) as client, client.create(prompt, seed=2) as player:
        frames = [player.step(a) for a in acts]
        assert httpx.get(f"{url}/readyz").status_code == 200
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


async def play_through(url, sessions, steps):
    """Plays sessions at once; for each what the player saw, and how often it had to reconnect."""

    async def one(number):
        acts = np.random.default_rng(number).integers(0, ACTIONS, steps).tolist()
        player = await AsyncPlayer.create(url, picture(number, SIZE, SIZE), seed=number)
        seen, slowest = [], 0.0
        for act in acts:
            began = time.perf_counter()
            seen.append(await player.step(act))
            slowest = max(slowest, time.perf_counter() - began)
        await player.close()
        return player, acts, seen, slowest

    return await asyncio.gather(*(one(n) for n in sessions))


class Kills(threading.Thread):
    """kill -9 of one replica after another, at random times."""

    def __init__(self, seed, victims):
        super().__init__()
        self.rng, self.victims, self.killed = np.random.default_rng(seed), victims, []

    def run(self):
        for deployment in self.victims:
            time.sleep(self.rng.uniform(0.5, 1.5))
            pid = int(self.rng.choice(replicas(deployment)))
            os.kill(pid, signal.SIGKILL)
            self.killed.append(deployment)


def check_kills(served, world, seed, sessions, steps, victims):
    kills = Kills(seed, victims)
    kills.start()
    played = asyncio.run(play_through(served.url, sessions, steps))
    kills.join()
    assert kills.killed == victims, "every kill happened while they played"
    store = SqliteStore(Home(served.config.home).sessions_db)
    for number, (player, acts, seen, slowest) in zip(sessions, played, strict=True):
        rows = list(store.rows(player.id, 0, 10**9))
        assert [r.step for r in rows] == list(range(steps + 1)), "every step exactly once"
        assert [r.action for r in rows[1:]] == acts
        want = uninterrupted(world, picture(number, SIZE, SIZE), number, acts)
        assert all(np.array_equal(a, b) for a, b in zip(seen, want, strict=True)), "frames as if nothing had happened"
        assert all(np.array_equal(decode_jpeg(r.jpeg), b) for r, b in zip(rows[1:], want, strict=True))
        log.info("session %s | reconnects %d | longest stall %.2f s", player.id, player.reconnects, slowest)
    store.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_replicas_cost_no_step(served, world, seed):
    """The journal's process is the gateway itself, so killing gateways also kills writers of the journal mid-commit."""
    victims = [GATEWAY, MODEL] if seed % 2 else [MODEL, GATEWAY]
    check_kills(served, world, seed, range(10 * seed, 10 * seed + 4), 150, victims)


def test_a_killed_journal_costs_no_step(served_home, engine, world, tmp_path):
    """Redis as the journal, killed twice under load and started again."""
    sessions, steps = range(40, 43), 60
    with running_redis(tmp_path) as (address, server), gateway_of(served_home, engine, address) as url:
        servers = [server]

        def kill():
            for _ in range(2):
                time.sleep(0.4)
                servers[-1].kill()
                servers[-1].wait()
                time.sleep(0.3)
                servers.append(start_redis(tmp_path, address))

        killer = threading.Thread(target=kill)
        killer.start()
        played = asyncio.run(play_through(url, sessions, steps))
        killer.join()
        store = open_store(address)
        for number, (player, acts, seen, _) in zip(sessions, played, strict=True):
            rows = list(store.rows(player.id, 0, 10**9))
            assert [r.step for r in rows] == list(range(steps + 1))
            want = uninterrupted(world, picture(number, SIZE, SIZE), number, acts)
            assert all(np.array_equal(a, b) for a, b in zip(seen, want, strict=True))
        store.close()
        stop(servers[-1])
    assert len(servers) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_replicas_cost_no_step_in_the_long_run(served, world, seed):
    check_kills(served, world, seed, range(100 + 10 * seed, 108 + 10 * seed), 600, [MODEL, GATEWAY, MODEL, GATEWAY])
