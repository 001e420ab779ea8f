from dataclasses import replace

import numpy as np
import pytest
import torch

from models.config import ModelError, SamplerConfig, WorldConfig
from models.world import World

SAMPLER = SamplerConfig(steps=2)


def walk(world, state, actions):
    frames = []
    for action in actions:
        state, frame = world.step(state, action)
        frames.append(frame)
    return state, frames


def test_the_same_start_seed_and_actions_give_the_same_frames(make_world, clip):
    world, prompt = make_world(), clip(1, 2)[0]
    _, first = walk(world, world.start(prompt, 1, SAMPLER), [0, 1, 2, 0, 1, 2])
    _, again = walk(world, world.start(prompt.numpy(), 1, SAMPLER), [0, 1, 2, 0, 1, 2])
    _, other = walk(world, world.start(prompt, 2, SAMPLER), [0, 1, 2, 0, 1, 2])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert first[0].shape == world.frame_shape
    assert first[0].dtype == torch.uint8


def test_branch_undo_and_return(make_world, clip):
    world = make_world()
    root, _ = walk(world, world.start(clip(1, 1)[0], 1, SAMPLER), [0, 1])
    left, frames_left = walk(world, root, [2, 2, 0])
    _, frames_right = walk(world, root, [1, 0, 0])
    _, undone = walk(world, root, [2, 2, 0])
    assert not torch.equal(frames_left[0], frames_right[0])
    assert all(torch.equal(a, b) for a, b in zip(frames_left, undone, strict=True))
    _, onward = walk(world, left, [1, 1])
    straight, _ = walk(world, world.start(clip(1, 1)[0], 1, SAMPLER), [0, 1, 2, 2, 0])
    _, expected = walk(world, straight, [1, 1])
    assert all(torch.equal(a, b) for a, b in zip(onward, expected, strict=True))


def test_two_sessions_in_turn_do_not_mix(make_world, clip):
    world = make_world()
    states = [world.start(clip(1, 1, i)[0], i, SAMPLER) for i in range(2)]
    alone = [walk(world, s, [0, 1, 2])[1] for s in states]
    for t in range(3):
        for i in range(2):
            states[i], frame = world.step(states[i], t)
            assert torch.equal(frame, alone[i][t])


def test_rollout_equals_stepping(make_world, clip):
    world = make_world()
    windows = [world.prompt_window(clip(1, n, n)[0], n) for n in (1, 2, 4)]
    actions = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 2, 2, 2], [1, 0, 1, 0, 1]])
    frames = world.rollout(windows, actions, SAMPLER)
    for i, n in enumerate((1, 2, 4)):
        _, expected = walk(world, world.start(clip(1, n, n)[0], n, SAMPLER), actions[i].tolist())
        assert torch.equal(frames[i], torch.stack(expected))


def test_all_actions_can_be_drawn_ahead(make_world, clip):
    world = make_world()
    state, _ = walk(world, world.start(clip(1, 1)[0], 1, SAMPLER), [0])
    ahead = world.ahead(state)
    assert len(ahead) == world.action_count
    for action, (after, frame) in enumerate(ahead):
        expected_state, expected = world.step(state, action)
        assert torch.equal(frame, expected)
        assert torch.equal(after.window.tokens, expected_state.window.tokens)
        assert torch.equal(world.step(after, 1)[1], world.step(expected_state, 1)[1])


def test_without_an_action_model_one_frame_starts_a_world(make_world, clip, tmp_path):
    full = make_world()
    world = World(full.tokenizer, None, full.dynamics)
    assert world.step(world.start(clip(1, 1)[0], 0, SAMPLER), 1)[1].shape == (12, 12, 3)
    with pytest.raises(ModelError, match="2 prompt frames, but this world has no latent action model"):
        world.start(clip(1, 2)[0])
    world.save(tmp_path)
    assert World.load(tmp_path).actions is None


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (np.zeros((0, 12, 12, 3), np.uint8), r"shape \(0, 12, 12, 3\); give \(1..4, 12, 12, 3\)"),
        (np.zeros((5, 12, 12, 3), np.uint8), r"shape \(5, 12, 12, 3\)"),
        (np.zeros((12, 12, 3), np.uint8), r"shape \(12, 12, 3\)"),
        (np.zeros((1, 12, 16, 3), np.uint8), "frames of shape"),
        (np.zeros((1, 12, 12, 3), np.float32), "frames of torch.float32; give uint8"),
    ],
)
def test_wrong_prompts_are_named(make_world, frames, words):
    with pytest.raises(ModelError, match=words):
        make_world().start(frames)


def test_wrong_actions_are_named_and_leave_the_session_as_it_was(make_world, clip):
    world = make_world()
    state = world.start(clip(1, 1)[0], 0, SAMPLER)
    with pytest.raises(ModelError, match="action 7 is out of range; this world knows 0..2"):
        world.step(state, 7)
    assert world.step(state, 1)[1].shape == (12, 12, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: replace(c, dynamics=replace(c.dynamics, rows=4)), "dynamics is for 4x3 tokens"),
        (lambda c: replace(c, dynamics=replace(c.dynamics, actions=9)), "dynamics.actions is 9"),
        (lambda c: replace(c, actions=replace(c.actions, height_px=16)), "actions watches 16x12 px"),
        (lambda c: replace(c, fps=0), "fps is 0"),
    ],
)
def test_parts_that_do_not_fit_are_named(make_world, change, words):
    config = make_world().config
    assert isinstance(config, WorldConfig)
    with pytest.raises(ModelError, match=words):
        change(config)
