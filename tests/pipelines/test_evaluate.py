import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.artifact import publish
from infra.config import UserError
from models.config import ModelError, SamplerConfig
from models.metrics import frechet_distance, random_features
from models.world import World
from pipelines.config import EvaluateConfig
from pipelines.control import rollouts
from pipelines.evaluate import alignment, evaluate, held_out, measure
from pipelines.measures import (
    DIRECTIONS,
    agreement,
    by_chance,
    directions,
    frame_psnr,
    interval,
    live_codes,
    merge_rare,
    moving_half,
    visible_shifts,
)
from pipelines.shards import open_dataset
from tests.pipelines import ring

CONFIG = EvaluateConfig(clips=48, prompts=4, batch=16, steps=(1, 4), sampler=SamplerConfig(steps=4, temperature=0.5))


@pytest.fixture(scope="module")
def found():
    """Everything that is measured on the trained ring world."""
    return measure(ring.trained(), *ring.footage(80, ring.FRAMES, seed=9), CONFIG)


def changed(**parts):
    """The trained world with copies of some of its models altered by functions."""
    world = ring.trained()
    made = {name: copy.deepcopy(getattr(world, name)) for name in ("tokenizer", "actions", "dynamics")}
    for name, change in parts.items():
        with torch.no_grad():
            change(made[name])
    return World(**made)


# -- measures ----------------------------------------------------------------------------------------------------


def texture(seed, size):
    return np.random.default_rng(seed).integers(0, 256, (size // 4, size // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=4))
def test_a_known_shift_of_the_picture_is_measured(seed, moves):
    picture, at, frames = texture(seed, 96), np.array([32, 32]), []
    for dy, dx in [(0, 0), *moves]:
        at = np.clip(at - [dy, dx], 0, 64)
        frames.append(picture[at[0] : at[0] + 32, at[1] : at[1] + 32])
    assert visible_shifts(np.stack(frames)[None])[0].tolist() == [list(move) for move in moves]


def test_large_pictures_are_searched_at_less_resolution_and_answer_in_their_own_pixels():
    picture = texture(1, 512).repeat(2, 0).repeat(2, 1)
    frames = np.stack([picture[:256, 256 : 256 + 320], picture[:256, 264 : 264 + 320]])
    assert visible_shifts(frames[None]).tolist() == [[[0, -8]]]


def test_noise_and_stillness_are_no_motion():
    noise = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32, 3), np.uint8)
    still = np.repeat(texture(2, 32)[None, None], 3, axis=1)
    assert not visible_shifts(noise).any()
    assert not visible_shifts(still).any()


def test_directions_have_the_right_names():
    shifts = np.array([[0, 0], [0, -3], [-2, 5], [7, 1], [1, 0]])
    assert [DIRECTIONS[c] for c in directions(shifts)] == ["still", "left", "up right", "down right", "down"]


def test_agreement_is_one_for_renamed_labels_zero_for_unrelated_and_symmetric():
    a = np.random.default_rng(0).integers(0, 4, 4000)
    b = np.random.default_rng(1).integers(0, 4, 4000)
    assert agreement(a, np.array([2, 0, 3, 1])[a]) == pytest.approx(1)
    assert agreement(a, b) < 0.01
    assert agreement(a // 2, a) == pytest.approx(agreement(a, a // 2)) == pytest.approx(2 * 1 / (1 + 2), abs=0.01)
    assert agreement(a, np.zeros_like(a)) == 0


def test_chance_agreement_is_what_few_samples_give():
    a, b = np.random.default_rng(0).integers(0, 8, (2, 60))
    assert by_chance(a, b, seed=0) == pytest.approx(agreement(a, b), abs=0.08)
    assert by_chance(a, b, seed=0) > 0.1


def test_merging_keeps_the_frequent_labels_apart():
    labels = np.repeat([0, 1, 2, 3], [10, 1, 8, 2])
    merged = merge_rare(labels, 3)
    assert len(np.unique(merged)) == 3
    assert len({*merged[labels == 1], *merged[labels == 3]}) == 1
    assert (merge_rare(labels, 4) == labels).all()


def test_the_interval_covers_the_mean_and_narrows_with_more_clips():
    random = np.random.default_rng(0)
    few, many = (interval(random.normal(0.5, 1, n), seed=1) for n in (40, 4000))
    assert few["low"] < few["mean"] < few["high"]
    assert many["low"] < 0.5 < many["high"]
    assert many["high"] - many["low"] == pytest.approx(2 * 1.96 / np.sqrt(4000), rel=0.15)
    assert interval(np.zeros(9), seed=0) == {"mean": 0, "low": 0, "high": 0}


def test_psnr_of_a_known_error_and_of_equal_frames():
    black = np.zeros((2, 3, 12, 12, 3), np.uint8)
    assert frame_psnr(black, black + 51) == pytest.approx(-10 * np.log10(0.04))
    assert frame_psnr(black, black) == pytest.approx(50)


def test_rare_codes_are_not_live():
    assert live_codes(np.repeat([0, 2, 3], [500, 494, 6]), 5).tolist() == [0, 2]


def test_the_moving_half_moves():
    clips = ring.footage(9, 6, seed=3)[0]
    clips[::2] = clips[::2, :1]
    assert moving_half(clips).sum() == 5
    assert moving_half(clips)[1::2].all()


def test_random_features_order_damage_to_video():
    real, other = ring.footage(64, 8, seed=1)[0], ring.footage(64, 8, seed=2)[0]
    noise = np.random.default_rng(0).normal(0, 1, other.shape)
    known = random_features(torch.from_numpy(real))

    def distance(clips):
        return frechet_distance(known, random_features(torch.from_numpy(np.ascontiguousarray(clips))))

    slight, strong = (distance(np.clip(other + s * noise, 0, 255).astype(np.uint8)) for s in (10, 40))
    assert known.shape == (64, 256)
    assert distance(real) == pytest.approx(0, abs=1e-3)
    assert distance(other) < slight < strong
    assert 3 * distance(other) < distance(other[:, :1].repeat(8, 1))
    assert torch.equal(random_features(torch.from_numpy(real[:2])), known[:2])


# -- the trained ring --------------------------------------------------------------------------------------------


def test_the_ring_is_understood(found):
    m = found.metrics
    assert m["tokenizer_psnr_db"] > 25
    assert m["tokenizer_gain_db"] > 3
    assert m["token_stability_still"] == m["token_stability_shift"] == 1
    assert m["actions_live"] == 3
    assert m["actions_perplexity"] > 2.7
    assert m["nmi_action"] > 0.9
    assert m["nmi_effect"] > 0.9
    assert m["nmi_action_chance"] < 0.1
    assert m["nmi_action_bound"] > 0.9
    assert m["masked_accuracy"] > 0.6
    assert m["held_effects"] == 3
    assert {row["effect"] for row in found.tables["holding"]} == {"left", "still", "right"}
    assert all(row["passed"] for row in found.tables["bars"])


def test_actions_that_steer_give_a_delta_psnr_above_zero(found):
    m = found.metrics
    for name in ("dpsnr", "dpsnr_uniform", "dpsnr_forced"):
        assert 0.5 < m[f"{name}_low_db"] < m[f"{name}_db"] < m[f"{name}_high_db"]
    assert m["dpsnr_moving_db"] > 0.5
    assert found.tables["control"]["t"] == 4
    assert len(found.tables["control"]["curves"]["permuted"]) == ring.FRAMES - 1


def test_more_refinement_steps_draw_better_frames_and_cost_time(found):
    one, four = found.tables["refinement"]["rows"]
    assert (one["steps"], four["steps"]) == (1, 4)
    assert four["first_psnr_db"] > one["first_psnr_db"]
    assert four["fps"] < one["fps"]


def test_distances_tell_real_from_damaged(found):
    m = found.metrics
    assert m["frd3d_windows"] == 40
    assert m["frd3d_tokens"] < 2 * m["frd3d_floor"] < m["frd3d_frozen"]
    assert m["frd3d_floor"] < m["frd3d"] < m["frd3d_frozen"]
    assert m["frd3d_floor"] < m["frd3d_shuffled"]


def test_one_window_is_too_few_for_a_distance():
    found = measure(ring.trained(), *ring.footage(3, ring.FRAMES, seed=9), replace(CONFIG, steps=()))
    assert "frd3d" not in found.metrics
    assert "refinement" not in found.tables


def test_a_world_that_ignores_its_actions_gets_exactly_zero():
    deaf = changed(dynamics=lambda model: model.action_embed.weight.zero_())
    m = measure(deaf, *ring.footage(24, ring.FRAMES, seed=9), CONFIG).metrics
    for name in ("dpsnr", "dpsnr_uniform", "dpsnr_moving", "dpsnr_forced"):
        assert (m[f"{name}_low_db"], m[f"{name}_db"], m[f"{name}_high_db"]) == (0, 0, 0)
    assert m["held_spread"] == 0
    assert m["nmi_action"] > 0.9


def test_a_collapsed_action_model_gets_exactly_zero_and_fails_its_bars():
    collapsed = changed(actions=lambda model: [model.project.weight.zero_(), model.project.bias.zero_()])
    found = measure(collapsed, *ring.footage(24, ring.FRAMES, seed=9), CONFIG)
    assert found.metrics["actions_perplexity"] == 1
    assert found.metrics["nmi_action"] == found.metrics["nmi_effect"] == found.metrics["dpsnr_db"] == 0
    assert [row["passed"] for row in found.tables["bars"]] == [True, False, False, False, False]


def test_neither_batch_nor_neighbours_change_a_rollout():
    world = ring.trained()
    frames, keys = ring.footage(6, ring.FRAMES, seed=4)
    tokens = world.tokenizer.encode(torch.from_numpy(frames)).numpy()[:, :1]
    past, seeds = np.empty((6, 0), np.int64), [5, 6, 7, 8, 9, 10]
    many = rollouts(world, tokens, past, keys, seeds, CONFIG)
    few = rollouts(world, tokens[2:4], past[2:4], keys[2:4], seeds[2:4], replace(CONFIG, batch=1))
    assert (many[2:4] == few).all()


def test_keys_that_are_off_by_one_frame_are_caught():
    world, (frames, keys) = ring.trained(), ring.footage(48, ring.FRAMES, seed=9)
    latent = world.actions.infer(torch.from_numpy(frames)).numpy()
    right = alignment(latent, keys)
    late = alignment(latent, np.roll(keys, 1, axis=1))
    assert max(right, key=right.get) == "0"
    assert max(late, key=late.get) == "1"


# -- from a dataset to an artifact -------------------------------------------------------------------------------


def test_held_out_windows_have_their_own_keys(home):
    dataset = open_dataset(home, ring.dataset(home, test=3))
    frames, keys = held_out(dataset, ring.trained(), replace(CONFIG, clips=999))
    assert frames.shape == (24, ring.FRAMES, 16, 16, 3)
    true, pressed = ring.footage(3, 40, seed=99)
    shifts = visible_shifts(frames)[..., 1]
    assert (np.sign(shifts) == 1 - keys).mean() > 0.95
    assert {tuple(k) for k in keys} <= {tuple(p[s : s + 4]) for p in pressed for s in range(0, 40, 5)}


def test_evaluating_twice_measures_once(home, tmp_path):
    reference = ring.dataset(home, test=3)
    world = ring.publish_world(home, tmp_path / "world", ring.trained(), reference)
    config = replace(CONFIG, home=home.path, world="ring", clips=12)
    made = evaluate(config)
    assert evaluate(replace(config, batch=7)) == made
    assert made.kind == "evaluation"
    assert made.parents == {"world": world.reference, "dataset": reference}
    assert made.metrics["nmi_action"] > 0.8
    assert {"reconstructions.png", "rollouts.png", "actions.png", "action-2.png", "measures.json"} <= set(made.files)
    assert json.loads((made.path / "measures.json").read_text())["clips"]["windows"] == 12
    assert evaluate(replace(config, seed=1)).version == "v2"


def test_a_record_without_keys_is_measured_without_them(home):
    dataset = open_dataset(home, ring.dataset(home, test=2, keys=False))
    found = measure(ring.trained(), *held_out(dataset, ring.trained(), CONFIG), CONFIG)
    assert "nmi_action" not in found.metrics
    assert found.metrics["nmi_effect"] > 0.8


def test_keys_recorded_late_show_in_the_artifact(home):
    dataset = open_dataset(home, ring.dataset(home, test=3, keys_late=1))
    found = measure(ring.trained(), *held_out(dataset, ring.trained(), CONFIG), CONFIG)
    shifts = found.tables["actions"]["alignment"]
    assert max(shifts, key=shifts.get) == "1"
    assert found.metrics["nmi_action"] < 0.3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"world": "rong"}, "did you mean ring"),
        ({"world": "ring-other"}, "is a tokenizer, a world is needed"),
        ({"dataset": "nowhere@0"}, "no dataset 'nowhere'"),
        ({"dataset": "none"}, "no held-out windows of 5 frames"),
        ({"dataset": "big"}, "has clips of 16x16 px, the world is for 32x32"),
    ],
)
def test_bad_input_is_one_clear_sentence(home, tmp_path, change, said):
    reference = ring.dataset(home, test=2)
    ring.dataset(home, test=0, name="none")
    world = ring.trained()
    if change.get("dataset") == "big":
        world = large()
        change = {"dataset": reference}
    ring.publish_world(home, tmp_path / "world", world, reference)
    (tmp_path / "other").mkdir()
    other = {"config": {}, "parents": {}, "metrics": {}, "identity": "x"}
    publish(home, name="ring-other", kind="tokenizer", source_dir=tmp_path / "other", **other)
    with pytest.raises(UserError, match=said):
        evaluate(replace(CONFIG, home=home.path, **{"world": "ring", **change}))


def large():
    """An untrained world for pictures twice the size."""
    tokenizer, actions, dynamics = ring.models()
    shape = {"height_px": 32, "width_px": 32}
    return World(
        type(tokenizer)(replace(tokenizer.cfg, **shape)),
        type(actions)(replace(actions.cfg, **shape)),
        type(dynamics)(replace(dynamics.cfg, rows=8, columns=8)),
    )


def test_a_world_without_a_latent_action_model_cannot_be_measured():
    world = ring.trained()
    bare = World(world.tokenizer, None, world.dynamics)
    with pytest.raises(UserError, match="no latent action model"):
        measure(bare, *ring.footage(4, ring.FRAMES, seed=0), CONFIG)


def test_settings_out_of_range_are_refused():
    for change in ({"clips": 1}, {"prompts": 0}, {"batch": 0}, {"steps": (4, 0)}):
        with pytest.raises(UserError, match="give a value from"):
            EvaluateConfig(**change)
    with pytest.raises(ModelError):
        SamplerConfig(steps=0)
