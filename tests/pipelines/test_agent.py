"""The policy's stage: what it stands on, what it shows, and an agent that plays a world."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from infra.config import UserError
from models.checkpoint import load_model
from models.config import PolicyConfig, SamplerConfig
from models.policy import Policy
from pipelines import loop
from pipelines.agent import agreement, play
from pipelines.jobs import plan_job
from pipelines.stages import look_flops, watched
from pipelines.train import train
from tests.pipelines import ring
from tests.pipelines.ranks import config, losses


@pytest.fixture(scope="module")
def turner():
    """A policy for the ring that always turns on the way that it turned last."""
    torch.manual_seed(0)
    shape = ring.transformer(4)
    policy = Policy(PolicyConfig(height_px=16, width_px=16, patch=4, frames=3, actions=3, transformer=shape))

    def loss(step):
        frames, keys = footage(16, 4, step)
        return policy({"frames": torch.from_numpy(frames), "actions": torch.from_numpy(keys)})[0]

    ring.fit(policy, 150, loss)
    return policy


def footage(count, frames, seed):
    """Clips of the ring in which a key is held for as long as the clip lasts."""
    frames_, keys = ring.footage(count * 40, frames, seed)
    held = (keys == keys[:, :1]).all(axis=1)
    return frames_[held][:count], keys[held][:count]


def test_an_agent_plays_on_as_the_policy_wants(turner):
    """Each next frame is the ring turned on the same way; the real frames say which that is."""
    world, steps = ring.trained(), 6
    frames, keys = footage(6, 3, seed=77)
    wanted = turner.act(torch.from_numpy(frames)).numpy()
    assert (wanted == keys[:, 0]).mean() > 0.8
    assert agreement(turner, frames, keys[:, 0])["held_out/accuracy"] == (wanted == keys[:, 0]).mean()
    assert agreement(turner, frames, np.array([0, 0, 0, 0, 1, 2]))["held_out/commonest"] == pytest.approx(4 / 6)
    played = play(turner, world, frames[0][0], steps, 5, SamplerConfig(steps=2))
    assert played.shape == (steps, 16, 16, 3) and played.dtype == np.uint8
    assert np.array_equal(played[0], frames[0][0])
    state = world.start(frames[0][:1], 5, SamplerConfig(steps=2))
    for t in range(1, steps):
        state, frame = world.step(state, int(turner.act(torch.from_numpy(played[None, :t]))))
        assert np.array_equal(frame.numpy(), played[t])


def test_a_policy_takes_its_shape_from_the_world_and_shows_how_it_plays(place, monkeypatch):
    world = train(config(place, stage="world", name="world"))
    settings = config(place, stage="policy", actions="world", picture_every=3)
    made = train(settings)
    assert (made.kind, made.parents) == ("policy", {"dataset": "toys@0", "actions": world.reference})
    policy = load_model(made.path, kind="policy")
    assert (policy.cfg.height_px, policy.cfg.actions) == (32, world.config["actions"]["codebook"]["size"])
    folder = plan_job(settings).folder
    assert {p.name for p in (folder / "pictures").iterdir()} == {f"played-{step:07d}.png" for step in (0, 3, 6)}
    looked = [line for line in map(json.loads, (folder / "progress.jsonl").open()) if "looked" in line]
    last = {name: value for name, value in looked[-1].items() if name.startswith("held_out/")}
    assert last == agreement(policy, *watched(plan_job(settings)))  # the published weights are those it looked at
    assert losses(folder, "accuracy").keys() == set(range(1, 7))
    monkeypatch.setattr(loop, "ceiling_flops", lambda device: look_flops(plan_job(settings)) / 7200)
    train(replace(settings, name="slow"))
    told = (plan_job(replace(settings, name="slow")).folder / "progress.jsonl").read_text()
    assert "no pictures: on this processor they would take 120 minutes or more" in told and "looked" not in told
    assert train(replace(settings, policy=replace(settings.policy, frames=2))).reference == "policy@v2"


def test_actions_that_watch_tokens_are_learned_from_too(place):
    base = config(place)
    model = replace(base.model, actions=replace(base.model.actions, source="tokens", vocabulary=32, patch=8))
    train(replace(base, stage="actions", name="watching", model=model))
    for stage in ("policy", "dynamics"):
        made = train(replace(base, stage=stage, actions="watching", name=f"after-{stage}", picture_every=6))
        assert made.parents["actions"] == "watching@v1"


def test_a_policy_needs_actions(place):
    with pytest.raises(UserError, match="tokenizer@v1 is a tokenizer: --actions takes latent actions or a world"):
        plan_job(config(place, stage="policy", actions="tokenizer"))
