import asyncio

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from models.config import SamplerConfig
from serving.client import AsyncPlayer, RemoteWorldEnv, WorldClient, remote_world_vector
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
