"""Versions under load, on the whole application: promoted, drained, asleep and awake; how many replicas there are."""

import asyncio
import time

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from infra.artifact import publish, resolve
from infra.config import TrackingConfig
from infra.registry import Registry
from infra.tracking import Run
from models.world import World
from serving.client import AsyncPlayer, WorldClient
from serving.pictures import decode_jpeg
from serving.store import open_store
from tests.serving.conftest import ACTIONS, SIZE, picture, publish_toy, uninterrupted
from tests.serving.fabric import Fabric


def register(home, artifact, folder):
    run = Run(TrackingConfig(), home, name=artifact.name, key=artifact.reference, folder=folder / artifact.version)
    run.model(artifact.path, artifact.reference, artifact.fingerprint)
    run.close()


@pytest.fixture(scope="module")
def versions(world, tmp_path_factory):
    """A home with toy@v1 (champion) and toy@v2 (candidate, other weights), and both worlds."""
    folder = tmp_path_factory.mktemp("versions")
    home = publish_toy(world, folder)
    first = resolve(home, "toy@v1")
    register(home, first, folder)
    other = World.load(first.path)
    with torch.no_grad():
        other.dynamics.head.weight.add_(torch.randn_like(other.dynamics.head.weight))
    other.save(folder / "world")
    second = publish(
        home, name="toy", kind="world", source_dir=folder / "world", config={}, parents={}, metrics={}, identity="2"
    )
    register(home, second, folder)
    return home, {"toy@v1": world, "toy@v2": World.load(second.path)}


@pytest.fixture(scope="module")
def fabric(versions, tmp_path_factory):
    """Nothing runs while nobody plays; up to two replicas of a version; a fifth of new sessions get the candidate."""
    with Fabric(
        versions[0], tmp_path_factory.mktemp("fabric"), replicas=0, max_replicas=2, slots=2, canary=0.2,
        drain_s=2.0, scale_down_s=4.0,
    ) as fabric:  # fmt: skip
        yield fabric


def eventually(check, patience_s=90):
    deadline = time.monotonic() + patience_s
    while not check():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


async def play(player, acts):
    return [await player.step(a) for a in acts]


async def create(fabric, number, model=None):
    return await AsyncPlayer.create(fabric.url, picture(number, SIZE, SIZE), seed=number, model=model, retry_s=120)


def check_frames(worlds, fabric_home, player, number, acts, seen):
    """Each step once in the journal, each frame that of its own version."""
    store = open_store(str(fabric_home.sessions_db))
    rows = list(store.rows(player.id, 0, 10**9))
    store.close()
    assert [r.step for r in rows] == list(range(len(acts) + 1))
    want = uninterrupted(worlds[player.model], picture(number, SIZE, SIZE), number, acts)
    assert all(np.array_equal(a, b) for a, b in zip(seen, want, strict=True))
    assert all(np.array_equal(decode_jpeg(r.jpeg), b) for r, b in zip(rows[1:], want, strict=True))


def actions(number, steps):
    return np.random.default_rng(number).integers(0, ACTIONS, steps).tolist()


def test_an_idle_world_has_no_replica_and_its_first_session_starts_one(versions, fabric):
    assert fabric.ask("count")["model"] == 0
    with WorldClient(fabric.url) as client:
        models = {m["reference"]: m["aliases"] for m in client.models()}
        assert models == {"toy@v1": ["champion"], "toy@v2": ["candidate"]}
        assert fabric.ask("count")["model"] == 0, "looking starts nothing"
        with client.create(picture(1, SIZE, SIZE), seed=1, model="toy@champion") as player:
            seen = [player.step(a) for a in actions(1, 5)]
            check_frames(versions[1], versions[0], player, 1, actions(1, 5), seen)
    assert fabric.ask("count")["world-toy-v1"] == 1


def test_more_sessions_than_slots_get_a_second_replica_and_idle_ones_go(versions, fabric):
    acts = {number: actions(number, 400) for number in range(10, 15)}

    async def crowd():
        players = [await create(fabric, number, "toy@v1") for number in acts]
        seen = [[] for _ in players]
        deadline = time.monotonic() + 120
        while (await asyncio.to_thread(fabric.ask, "count"))["world-toy-v1"] < 2 or len(seen[0]) < 40:
            assert time.monotonic() < deadline
            ahead = (play(p, acts[p.seed][len(f) : len(f) + 10]) for p, f in zip(players, seen, strict=True))
            seen = [f + more for f, more in zip(seen, await asyncio.gather(*ahead), strict=True)]
        for player, frames in zip(players, seen, strict=True):
            await player.close()
            number = player.seed
            check_frames(versions[1], versions[0], player, number, acts[number][: len(frames)], frames)

    asyncio.run(crowd())
    eventually(lambda: fabric.ask("count")["model"] == 0)


def test_a_canary_gets_its_share_and_a_session_keeps_its_version(fabric):
    with WorldClient(fabric.url) as client:
        players = {}
        for n in range(100):  # a fifth of the ids, which are random, get the candidate
            player = client.create(gallery="0", seed=n)
            players.setdefault(player.model, player)
            if len(players) == 2:
                break
        assert set(players) == {"toy@v1", "toy@v2"}
        for model, player in players.items():
            assert client.resume(player.id, player.token).model == model


def test_a_promotion_under_load_loses_no_step(versions, fabric):
    """Old sessions finish on the old version, new ones get the new one, and the old one goes when they have ended."""
    home, worlds = versions

    async def scenario():
        acts = {n: actions(n, 80) for n in range(30, 38)}
        old = [await create(fabric, n, "toy@champion") for n in range(30, 34)]
        assert {p.model for p in old} == {"toy@v1"}
        playing = [asyncio.create_task(play(p, acts[30 + n])) for n, p in enumerate(old)]
        await asyncio.sleep(1.0)
        assert Registry(TrackingConfig(), home).promote("toy@2") == {"champion": "toy@v2"}
        while (await create(fabric, 99, "toy@champion")).model != "toy@v2":
            await asyncio.sleep(0.2)
        new = [await create(fabric, n) for n in range(34, 38)]
        assert {p.model for p in new} == {"toy@v2"}
        after = await asyncio.gather(*(play(p, acts[34 + n]) for n, p in enumerate(new)))
        before = await asyncio.gather(*playing)
        for number, player, seen in zip(range(30, 38), [*old, *new], [*before, *after], strict=True):
            await player.close()
            check_frames(worlds, home, player, number, acts[number], seen)
        return old[0], before[0]

    player, seen = asyncio.run(scenario())
    eventually(lambda: not fabric.ask("count").get("world-toy-v1"))
    with WorldClient(fabric.url) as client:
        assert [m["reference"] for m in client.models()] == ["toy@v2"]
        late = client.resume(player.id, player.token)  # its version is started for it again
        assert late.model == "toy@v1"
        more = actions(30, 90)[80:]
        seen = [*seen, *(late.step(a) for a in more)]
        check_frames(worlds, home, late, 30, [*actions(30, 80), *more], seen)
        late.close()


def test_pickle_has_no_part_in_it(versions):
    client = MlflowClient(versions[0].tracking_uri)
    files = [p for p in (versions[0].path / "mlartifacts").rglob("*") if p.is_file()]
    assert len(client.search_model_versions("name = 'toy'")) == 2
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".png", ".yaml"}
