import asyncio

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from models.config import SamplerConfig
from serving.client import AsyncPlayer, WorldClient
from serving.env import RemoteWorldEnv, RemoteWorldVectorEnv
from serving.pictures import decode_jpeg, encode_jpeg
from serving.protocol import Problem
from tests.serving.conftest import ACTIONS, SAMPLER, SIZE, picture

ACTS = [i * 3 % ACTIONS for i in range(20)]


@pytest.fixture
def client(local):
    with WorldClient(local) as client:
        yield client


def test_a_session_is_the_world_itself(client, world):
    """Frames that travel through gateway, engine and journal are those of `World.step`, past several cache epochs."""
    prompt = picture(3, SIZE, SIZE)
    with client.create(prompt, seed=11) as player:
        frames = [player.step(a) for a in ACTS]
        assert player.step_number == len(ACTS)
    state = world.start(prompt[None], 11, SAMPLER)
    for action, frame in zip(ACTS, frames, strict=True):
        state, want = world.step(state, action)
        assert np.array_equal(frame, decode_jpeg(encode_jpeg(want.numpy())))
    assert len({f.tobytes() for f in frames}) > 10
    assert isinstance(SAMPLER, SamplerConfig)


def test_the_same_seed_gives_the_same_frames_and_another_does_not(client):
    def play(seed):
        with client.create(gallery="1", seed=seed) as player:
            return [player.step(a).tobytes() for a in ACTS[:6]]

    assert play(5) == play(5)
    assert play(5) != play(6)


def test_several_prompt_frames_carry_their_motion(client):
    frames = np.stack([picture(i, SIZE, SIZE) for i in range(3)])
    with client.create(frames, seed=1) as player:
        player.step(2)
        about = player.history()
    assert (about["first"], about["start"], about["step"]) == (0, 2, 3)
    assert about["history"][0] == -1
    assert len(about["history"]) == 4
    assert about["history"][3] == 2


def test_fork_rewind_and_replay(client):
    with client.create(gallery="0", seed=4) as player:
        frames = [player.step(a) for a in ACTS]
        assert player.replay() == {"steps": len(ACTS), "equal": True, "differs_at": None}
        with player.fork(8) as same, player.fork(8) as other:
            assert same.step_number == 8
            again = [same.step(a) for a in ACTS[8:]]
            assert all(np.array_equal(a, b) for a, b in zip(again, frames[8:], strict=True)), "the same acts lead there"
            turned = other.step((ACTS[8] + 1) % ACTIONS)
            assert not np.array_equal(turned, frames[8]), "another act leads elsewhere"
            assert np.array_equal(other.frame(8), frames[7])
        assert player.step_number == len(ACTS), "a fork leaves its parent alone"
        assert np.array_equal(player.frame(3), frames[2])


def test_a_session_goes_on_where_it_was_left(client):
    with client.create(gallery="0", seed=9) as player:
        for a in ACTS[:5]:
            player.step(a)
    with client.resume(player.id, player.token) as again:
        assert again.step_number == 5
        again.step(1)
        assert again.step_number == 6


def test_whoever_attaches_last_holds_the_session(client):
    first = client.create(gallery="0", seed=9)
    first.step(0)
    second = client.resume(first.id, first.token)
    second.step(1)
    with pytest.raises(Problem) as fenced:
        first.step(2)
    assert fenced.value.status == 410
    assert second.history()["history"][1:] == [0, 1]
    first.close()
    second.close()


def test_an_export_is_a_video_of_every_frame(client, tmp_path):
    import cv2

    with client.create(gallery="0", seed=9) as player:
        frames = [player.frame(0), *(player.step(a) for a in ACTS[:7])]
        data = player.export()
        assert player.export() == data, "the same session is the same file"
        (tmp_path / "x.mp4").write_bytes(data)
    video = cv2.VideoCapture(str(tmp_path / "x.mp4"))
    got = []
    while (read := video.read())[0]:
        got.append(cv2.resize(read[1][..., ::-1], (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    assert len(got) == 8
    assert video.get(cv2.CAP_PROP_FPS) == 10
    for i, frame in enumerate(frames):  # chroma is halved in a video that plays everywhere: compare lightness
        near = [np.abs(g.mean(2) - frame.mean(2)).mean() for g in got]
        assert int(np.argmin(near)) == i


def test_async_players_share_the_engine_without_noticing_each_other(client, local):
    async def play(seed):
        player = await AsyncPlayer.create(local, gallery="2", seed=seed)
        frames = [(await player.step(a)).tobytes() for a in ACTS[:10]]
        await player.close()
        return frames

    async def play_all():
        return await asyncio.gather(*(play(100 + i) for i in range(7)))  # more players than slots

    together = asyncio.run(play_all())
    for i, frames in enumerate(together):
        with client.create(gallery="2", seed=100 + i) as alone:
            assert frames == [alone.step(a).tobytes() for a in ACTS[:10]]


def test_the_environment_is_a_proper_one(local):
    env = RemoteWorldEnv(local, max_steps=5)
    check_env(env, skip_render_check=True)
    first, _ = env.reset(seed=3, options={"image": picture(1)})
    ends = [env.step(i % ACTIONS) for i in range(5)]
    assert [e[3] for e in ends] == [False] * 4 + [True]
    second, _ = env.reset(seed=3, options={"image": picture(1)})
    assert np.array_equal(first, second)
    assert np.array_equal(env.step(0)[0], ends[0][0])
    env.close()


def test_a_vector_of_environments_is_its_worlds_side_by_side(local):
    acts = np.random.default_rng(1).integers(0, ACTIONS, (6, 3))
    envs = RemoteWorldVectorEnv(3, local, max_steps=4)
    first, _ = envs.reset(seed=5)
    assert first.shape == (3, SIZE, SIZE, 3)
    assert first in envs.observation_space
    played = [envs.step(row) for row in acts]
    assert [p[3].all() for p in played] == [False] * 3 + [True] + [False] * 2
    assert np.array_equal(played[4][0], first), "after the end the next episode begins, whatever the action"
    for i in range(3):
        alone = RemoteWorldEnv(local, max_steps=4)
        assert np.array_equal(alone.reset(seed=5 + i)[0], first[i])
        for row, got in zip(acts[:4, i], played, strict=False):
            assert np.array_equal(alone.step(row)[0], got[0][i])
        alone.reset()
        assert np.array_equal(alone.step(acts[5, i])[0], played[5][0][i]), "the next episode draws on"
        alone.close()
    assert not np.array_equal(played[0][0][0], played[0][0][1])
    envs.close()


def test_an_async_player_does_all_that_a_player_does(client, local):
    async def play():
        player = await AsyncPlayer.create(local, gallery="0", seed=4)
        frames = [await player.step(a) for a in ACTS[:6]]
        again = await AsyncPlayer.resume(local, player.id, player.token)
        fork = await player.fork(3)
        ahead = await fork.rollouts([ACTS[3:6]])
        assert np.array_equal(ahead[0, 2], frames[5])
        assert np.array_equal(await again.frame(6), frames[5])
        assert (await player.history())["history"] == [-1, *ACTS[:6]]
        assert (await player.replay())["equal"]
        assert (await player.export())[4:8] == b"ftyp"
        await fork.delete()
        with pytest.raises(Problem, match="no such session"):
            await fork.frame(0)
        with pytest.raises(Problem, match="action 300"):
            await player.step(300)
        await player.close()
        return frames

    frames = asyncio.run(play())
    with client.create(gallery="0", seed=4) as player:
        assert all(np.array_equal(player.step(a), f) for a, f in zip(ACTS, frames, strict=False))
