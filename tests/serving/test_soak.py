"""kill -9 of everything that a served world is made of, while players play: nothing is lost, nothing is done twice.

pytest -m slow tests/serving/test_soak.py    # ten seeds of 8 players x 600 steps
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field

import numpy as np
import pytest

from serving.client import AsyncPlayer
from serving.pictures import decode_jpeg
from serving.store import open_store
from tests.serving.conftest import ACTIONS, SIZE, picture, uninterrupted
from tests.serving.fabric import Fabric

log = logging.getLogger(__name__)

EVERYTHING = ("model", "gateway", "fleet", "proxy", "controller", "store", "node")


@dataclass
class Played:
    """What one player did and saw."""

    player: AsyncPlayer
    number: int
    acts: list = field(default_factory=list)
    seen: list = field(default_factory=list)
    spans: list = field(default_factory=list)
    """(asked, answered) of every step."""

    async def play(self, rng, steps, enough):
        """So many steps, and on while `enough` is not set: however fast the machine, every kill falls into the play."""
        while len(self.acts) < steps or not enough.is_set():
            self.acts.append(int(rng.integers(0, ACTIONS)))
            asked = time.monotonic()
            self.seen.append(await self.player.step(self.acts[-1]))
            self.spans.append((asked, time.monotonic()))
        await self.player.close()


async def soak(fabric, seed, sessions, steps, kinds):
    """Plays, and kills each kind once in a random order at random moments of the play.

    Returns:
        What was played, and the kills as (kinds that were down together, moment).
    """
    rng, *theirs = np.random.default_rng(seed).spawn(1 + sessions)
    played, enough = [], asyncio.Event()
    for number in range(sessions):
        prompt = picture(number, SIZE, SIZE)
        player = await AsyncPlayer.create(fabric.url, prompt, seed=seed * 100 + number, retry_s=300)
        played.append(Played(player, number))
    playing = [asyncio.create_task(p.play(own, steps, enough)) for p, own in zip(played, theirs, strict=True)]
    moments = np.sort(rng.uniform(0.05, 0.8, len(kinds))) * sessions * steps
    killed = []
    for kind, moment in zip(rng.permutation(kinds).tolist(), moments, strict=True):
        await until(lambda moment=moment: sum(len(p.seen) for p in played) >= moment, playing)
        if killed and rng.random() < 0.7:  # otherwise the two are down together
            await until(lambda: all(answered(p, killed[-1][1]) for p in played), playing)
        began = time.monotonic()
        await asyncio.to_thread(fabric.kill, kind)
        together = killed and not all(answered(p, killed[-1][1]) for p in played)
        killed.append(([*killed[-1][0], kind] if together else [kind], began))
    await until(lambda: all(answered(p, killed[-1][1]) for p in played), playing)
    enough.set()
    await asyncio.gather(*playing)
    return played, killed


def answered(played, moment):
    """Whether a player has asked for and got a step since a moment."""
    return bool(played.spans) and played.spans[-1][0] > moment


async def until(true, playing):
    """Waits for something while they play, and raises what ended a player's play."""
    while not true():
        await asyncio.sleep(0.005)
        for task in playing:
            if task.done():
                task.result()


def check(fabric, world, seed, played):
    """Every step is in the journal exactly once, and every frame is the one of an uninterrupted session."""
    store = open_store(fabric.store)
    for one in played:
        rows = list(store.rows(one.player.id, 0, 10**9))
        assert [r.step for r in rows] == list(range(len(one.acts) + 1)), "every step exactly once"
        assert [r.action for r in rows[1:]] == one.acts
        want = uninterrupted(world, picture(one.number, SIZE, SIZE), seed * 100 + one.number, one.acts)
        assert all(np.array_equal(a, b) for a, b in zip(one.seen, want, strict=True)), "frames as if nothing happened"
        assert all(np.array_equal(decode_jpeg(r.jpeg), b) for r, b in zip(rows[1:], want, strict=True))
    store.close()


def stalls(played, killed):
    """For each kill, what was down and how long at most a player waited for one of the next two frames."""
    for kinds, moment in killed:
        after = [[s for s in p.spans if s[1] > moment][:2] for p in played]
        waits = [max((answer - max(asked, moment) for asked, answer in spans), default=0.0) for spans in after]
        yield "+".join(kinds), max(waits), np.median(waits)


def run(home, world, folder, seed, sessions, steps, kinds, **more):
    with Fabric(home, folder, nodes=2, seed=seed, gateways=2, replicas=2, slots=4, **more) as fabric:
        played, killed = asyncio.run(soak(fabric, seed, sessions, steps, kinds))
        for down, longest, median in stalls(played, killed):
            log.info("soak | seed %d | killed %s | stall %.2f s, median player %.2f s", seed, down, longest, median)
        log.info("soak | seed %d | reconnects %s", seed, [p.player.reconnects for p in played])
        check(fabric, world, seed, played)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("seed", "kinds"), [(1, ("model", "gateway", "store")), (2, ("controller", "fleet", "node", "proxy"))]
)
def test_kills_cost_no_step(served_home, world, tmp_path, seed, kinds):
    """Shorter than in the long run below (80 steps): the same checks, each kind once."""
    run(served_home, world, tmp_path, seed, 8, 80, kinds)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("seed", range(10, 20))
def test_kills_cost_no_step_in_the_long_run(served_home, world, tmp_path, seed):
    run(served_home, world, tmp_path, seed, 8, 600, EVERYTHING)
