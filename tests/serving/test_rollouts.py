"""Frames computed ahead of a session: they are those that it would show, and leave no trace."""

import asyncio
import threading

import httpx
import numpy as np
import pytest

from serving.client import AsyncPlayer, WorldClient
from serving.config import Limits
from serving.protocol import Problem
from tests.serving.conftest import ACTIONS, SIZE, gateway_of
from tests.serving.test_gateway import bearer, create, refused

ROWS = np.random.default_rng(0).integers(0, ACTIONS, (6, 9))
"""More rollouts than slots, past the cache's epoch."""


@pytest.fixture
def player(local):
    with WorldClient(local) as client, client.create(gallery="0", seed=8) as player:
        for action in (1, 2, 3, 4):
            player.step(action)
        yield player


def test_a_rollout_shows_what_playing_shows(player):
    ahead = player.rollouts(ROWS)
    assert ahead.shape == (6, 9, SIZE, SIZE, 3)
    assert (player.step_number, len(player.history()["history"])) == (4, 5), "the session stays where it is"
    for row, frames in zip(ROWS[:2], ahead, strict=False):
        with player.fork() as fork:
            assert all(np.array_equal(fork.step(a), frame) for a, frame in zip(row, frames, strict=True))


def test_asked_twice_it_answers_the_same_from_any_step(player):
    past = player.rollouts(ROWS[:2], step=2)
    assert np.array_equal(past, player.rollouts(ROWS[:2], step=2))
    with player.fork(2) as fork:
        assert np.array_equal(fork.step(ROWS[0][0]), past[0, 0])


def test_rollouts_and_replays_are_right_while_others_take_their_slots(player, local):
    """More players than slots: what is being computed loses its cache again and again."""
    want, over = player.rollouts(ROWS), threading.Event()

    async def crowd():
        async def play(seed):
            other = await AsyncPlayer.create(local, gallery="1", seed=seed)
            while not over.is_set():
                await other.step(seed % ACTIONS)
            await other.close()

        await asyncio.gather(*(play(seed) for seed in range(6)))

    others = threading.Thread(target=asyncio.run, args=(crowd(),))
    others.start()
    try:
        assert np.array_equal(player.rollouts(ROWS), want)
        assert player.replay() == {"steps": 4, "equal": True, "differs_at": None}
    finally:
        over.set()
        others.join()


@pytest.mark.parametrize(
    ("change", "status", "slug"),
    [
        ({"actions": [[ACTIONS]]}, 422, "action-out-of-range"),
        ({"actions": [[0] * 300] * 4}, 422, "rollout-too-large"),
        ({"actions": [[0, 1], []]}, 422, "invalid-request"),
        ({"actions": []}, 422, "invalid-request"),
        ({"actions": [["left"]]}, 422, "invalid-request"),
        ({"step": 5}, 404, "no-such-step"),
        ({"session": "abc"}, 404, "no-such-session"),
        ({"frames": "some"}, 422, "invalid-request"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(player, local, change, status, slug):
    body = {"session": player.id, "actions": [[0]], **change}
    answer = httpx.post(f"{local}/v1/rollouts", json=body, headers={"authorization": f"Bearer {player.token}"})
    refused(answer, status, slug)
    with pytest.raises(Problem, match="action 9"):
        player.rollouts([[9]])


def test_rollouts_are_bounded_for_all_together(served_home, engine, tmp_path):
    few = Limits(rollout_frames=40)
    with gateway_of(served_home, engine, tmp_path / "db", limits=few) as url, httpx.Client(base_url=url) as http:
        made = create(http).json()
        body = {"session": made["session"], "actions": [[0] * 10] * 4, "frames": "last"}
        answers = []

        def ask():
            answers.append(httpx.post(f"{url}/v1/rollouts", json=body, headers=bearer(made), timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        done = [a for a in answers if a.status_code == 200]
        late = [a for a in answers if a.status_code == 429]
        assert (len(done) >= 2, len(done) + len(late)) == (True, 5)
        assert len({a.text for a in done}) == 1
        assert [len(row) for row in done[0].json()["frames"]] == [1] * 4
        for answer in late:
            told = refused(answer, 429, "too-many-rollouts")
            assert (told["limit"], answer.headers["retry-after"]) == (80, "2")
            assert told["position"] > 0
