"""Sessions are exact: cached, restored, branched, alone or in company, they draw the same tokens."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.config import ModelError, SamplerConfig
from models.maskgit import draw, halton_order, reveal_counts
from models.noise import uniform
from models.sampler import Decoder, Window

FRAMES, CODES, ACTIONS, TOKENS = 4, 16, 3, 9
RELAXED = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def play(world, window: Window, actions: list[int], sampler: SamplerConfig, slots: int = 1) -> tuple[list, Decoder]:
    """Play one session alone -> its finished frames."""
    decoder = Decoder(world, slots, sampler)
    decoder.restore(slots - 1, window)
    frames = []
    for action in actions:
        decoder.begin(slots - 1, action)
        found = []
        while not found:
            found = decoder.advance()
        frames += found
    return frames, decoder


def full_window(world, window: Window, action: int, sampler: SamplerConfig) -> torch.Tensor:
    """Tokens of the next frame, recomputing the whole window in each refinement pass: slow, and plainly right."""
    model, N = world.dynamics, TOKENS
    current = torch.full((1, 1, N), model.mask_token)
    actions = torch.cat((window.actions, torch.tensor([action])))[None]
    place = torch.arange(N)
    for p in range(sampler.steps):
        with torch.no_grad():
            text = torch.tensor([window.text], dtype=torch.int64)
            logits = model.logits(torch.cat((window.tokens[None], current), 1), actions, text=text)[:, -1]
        noise = uniform(window.seed, window.step + 1, torch.tensor(p), 101, place)
        token, score = draw(logits, noise[None], sampler.temperature, sampler.top_k)
        if sampler.order == "halton":
            score = -halton_order(3, 3)[None].float()
        elif sampler.order == "random":
            score = uniform(window.seed, window.step + 1, 102, place)[None]
        else:
            gumbel = -torch.log(-torch.log(uniform(window.seed, window.step + 1, torch.tensor(p), 102, place)))
            score = score + sampler.order_noise * (1 - (p + 1) / sampler.steps) * gumbel
        known = current[0] != model.mask_token
        rank = score.masked_fill(known, torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        show = rank < reveal_counts(N, sampler.steps)[p]
        current = torch.where(known, current[0], torch.where(show, token, model.mask_token))[None]
    return current[0, 0]


modes = st.fixed_dictionaries(
    {
        "action_mode": st.sampled_from(["additive", "prepended", "film"]),
        "kv_heads": st.sampled_from([0, 1]),
        "attention": st.sampled_from(["st", "full"]),
        "layers": st.integers(2, 4),
        "policy": st.sampled_from(["epoch", "reprefill", "rolling"]),
        "order": st.sampled_from(["confidence", "random", "halton"]),
        "steps": st.integers(1, 5),
        "prompt": st.integers(1, FRAMES),
        "corruption": st.sampled_from([0.0, 0.2]),
        "words": st.sampled_from([0, 2]),
    }
)


@RELAXED
@given(mode=modes)
def test_cached_decoding_equals_full_window_decoding_in_fp64(make_world, clip, mode):
    """What each policy is exact to: the window since the last anchor, the last T-1 frames, or the whole stream."""
    rolling = mode["policy"] == "rolling"
    shape = {"layers": mode["layers"], "attention": mode["attention"], "kv_heads": mode["kv_heads"]}
    shape["window"] = 2 if rolling else FRAMES
    world = make_world(
        dynamics={name: mode[name] for name in ("action_mode", "corruption", "words")} | {"transformer": shape},
        tokenizer={"decoder": {"window": 2 if rolling else FRAMES}},
        double=True,
    )
    sampler = SamplerConfig(steps=mode["steps"], policy=mode["policy"], order=mode["order"], temperature=1.5)
    window = world.prompt_window(clip(1, mode["prompt"])[0], 9, "A title")
    decoder = Decoder(world, 1, sampler)
    decoder.restore(0, window)
    tokens, actions = window.tokens, window.actions  # of the whole stream, or since the anchor
    for t in range(7):
        if not rolling and len(tokens) >= FRAMES:
            keep = FRAMES // 2 if mode["policy"] == "epoch" else FRAMES - 1
            tokens, actions = tokens[-keep:], actions[len(actions) - keep + 1 :]
        expected = full_window(world, Window(tokens, actions, window.step + t, 9, window.text), t % ACTIONS, sampler)
        decoder.begin(0, t % ACTIONS)
        found = []
        while not found:
            found = decoder.advance()
        assert torch.equal(found[0].tokens, expected)
        tokens = torch.cat((tokens, expected[None]))
        actions = torch.cat((actions, torch.tensor([t % ACTIONS])))
        assert torch.equal(found[0].frame, world.tokenizer.decode(tokens[None])[0, -1])


def test_without_the_commit_pass_the_cache_is_wrong(make_world, clip, monkeypatch):
    world = make_world(double=True)
    sampler = SamplerConfig(steps=3)
    window = world.prompt_window(clip(1, 1)[0], 4)
    right, _ = play(world, window, [0, 1, 2], sampler)
    features = Decoder._features

    def lazy(self, slots):
        caches = [c for c in self.caches if c is not None]
        before = [(c.keys.clone(), c.values.clone()) for c in caches]
        x = features(self, slots)
        if any(self._slots[i].phase == 2 for i in slots):
            for cache, (keys, values) in zip(caches, before, strict=True):
                cache.keys.copy_(keys)
                cache.values.copy_(values)
        return x

    monkeypatch.setattr(Decoder, "_features", lazy)
    wrong, _ = play(world, window, [0, 1, 2], sampler)
    assert torch.equal(right[0].tokens, wrong[0].tokens)
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(right, wrong, strict=True))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_frame_costs_its_steps_and_one_commit(make_world, clip, steps):
    world = make_world(dynamics={"frames": 40, "transformer": {"window": 40}})
    frames, decoder = play(world, world.prompt_window(clip(1, 1)[0]), [0] * 6, SamplerConfig(steps=steps))
    while decoder.busy:
        decoder.advance()
    assert decoder.passes == 1 + 6 * (steps + 1)


def test_the_frame_is_handed_out_before_its_commit(make_world, clip):
    world = make_world()
    _, decoder = play(world, world.prompt_window(clip(1, 1)[0]), [0], SamplerConfig(steps=3))
    assert decoder.passes == 1 + 3
    assert decoder.busy
    assert decoder.advance() == []
    assert (decoder.passes, decoder.busy) == (5, False)


@pytest.mark.parametrize("policy", ["epoch", "reprefill", "rolling"])
@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_a_session_alone_equals_itself_among_seven_others(make_world, clip, policy, order):
    rolling = {"window": 2} if policy == "rolling" else {}
    world = make_world(dynamics={"transformer": rolling | {"layers": 4}}, tokenizer={"decoder": rolling})
    sampler = SamplerConfig(steps=3, policy=policy, order=order)
    window = world.prompt_window(clip(1, 2)[0], 77)
    actions = [i % ACTIONS for i in range(9)]
    alone, _ = play(world, window, actions, sampler)
    decoder, chance, got = Decoder(world, 8, sampler), random.Random(1), []
    for slot in range(8):
        decoder.restore(slot, window if slot == 3 else world.prompt_window(clip(1, 1 + slot % 3, slot)[0], slot))
    decoder.begin(3, actions[0])
    while len(got) < len(actions):
        for slot in (0, 1, 2, 4, 5, 6, 7):
            session = decoder._slots[slot]
            if session is not None and session.phase == 0 and chance.random() < 0.4:
                decoder.begin(slot, chance.randrange(ACTIONS))
        if len(got) == 4 and decoder._slots[6] is not None:
            decoder.release(6)
        for found in decoder.advance():
            if found.slot == 3:
                got.append(found)
                if len(got) < len(actions):
                    decoder.begin(3, actions[len(got)])
    for a, b in zip(alone, got, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.frame, b.frame)


@pytest.mark.parametrize("policy", ["epoch", "reprefill", "rolling"])
def test_a_session_goes_on_the_same_after_any_restore(make_world, clip, policy):
    rolling = {"window": 2} if policy == "rolling" else {}
    world = make_world(dynamics={"transformer": rolling | {"layers": 4}}, tokenizer={"decoder": rolling})
    sampler = SamplerConfig(steps=2, policy=policy)
    actions = [i % ACTIONS for i in range(10)]
    decoder = Decoder(world, 1, sampler)
    decoder.restore(0, world.prompt_window(clip(1, 3)[0], 5))
    frames, windows = [], []
    for action in actions:
        windows.append(decoder.window(0))
        decoder.begin(0, action)
        while not (found := decoder.advance()):
            pass
        frames += found
    for t in range(len(actions)):
        again, _ = play(world, windows[t], actions[t:], sampler)
        for a, b in zip(frames[t:], again, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.frame, b.frame)


def test_an_action_given_during_the_commit_waits_for_it(make_world, clip):
    world = make_world()
    sampler = SamplerConfig(steps=2)
    window = world.prompt_window(clip(1, 1)[0], 2)
    hasty, _ = play(world, window, [0, 1], sampler)
    decoder, calm = Decoder(world, 1, sampler), []
    decoder.restore(0, window)
    for action in (0, 1):
        decoder.begin(0, action)
        while decoder.busy:
            calm += decoder.advance()
    assert [f.tokens.tolist() for f in hasty] == [f.tokens.tolist() for f in calm]


def test_several_threads_fall_back_to_one_slot_at_a_time(make_world, clip, monkeypatch):
    world = make_world()
    sampler = SamplerConfig(steps=2)
    monkeypatch.setattr("models.sampler.rows_alone_equal_rows_together", lambda *_: False)
    windows = [world.prompt_window(clip(1, 1, i)[0], i) for i in range(3)]
    decoder = Decoder(world, 3, sampler)
    for slot, window in enumerate(windows):
        decoder.restore(slot, window)
        decoder.begin(slot, slot)
    found = [f for _ in range(2) for f in decoder.advance()]
    for slot, window in enumerate(windows):
        assert torch.equal(found[slot].tokens, play(world, window, [slot], sampler)[0][0].tokens)


def test_noise_depends_on_seed_and_step(make_world, clip):
    world = make_world()
    window = world.prompt_window(clip(1, 1)[0], 1)
    sampler = SamplerConfig(steps=2)
    first = play(world, window, [0], sampler)[0][0].tokens
    assert torch.equal(first, play(world, window, [0], sampler)[0][0].tokens)
    assert not torch.equal(first, play(world, replace(window, seed=2), [0], sampler)[0][0].tokens)
    assert not torch.equal(first, play(world, replace(window, step=7), [0], sampler)[0][0].tokens)


def test_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(1, 20000, 4)
    noise = uniform(3, torch.arange(20000))[None]
    tokens, logp = draw(logits, noise, 1.0)
    shares = torch.bincount(tokens.flatten(), minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.012, rtol=0)
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.3, 0.15, 0.05])[tokens])
    assert set(draw(logits, noise, 1.0, top_k=2)[0].unique().tolist()) == {0, 1}
    assert set(draw(logits, noise, 0.0)[0].unique().tolist()) == {0}


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (8, 8), (23, 40)])
def test_halton_order_is_a_permutation_that_spreads_early_places(rows, columns):
    order = halton_order(rows, columns)
    assert sorted(order.tolist()) == list(range(rows * columns))
    if rows > 3:
        first = (order < rows * columns // 8).nonzero().flatten()
        quarters = {(int(p) // columns * 2 // rows, int(p) % columns * 2 // columns) for p in first}
        assert len(quarters) == 4


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda d, w: d.begin(0, ACTIONS), "action 3 is out of range"),
        (lambda d, w: d.begin(0, -1), "action -1 is out of range"),
        (lambda d, w: d.begin(1, 0), "slot 1 holds no session"),
        (lambda d, w: d.begin(2, 0), "slot 2 is out of range"),
        (lambda d, w: d.restore(0, w), "slot 0 is taken"),
        (lambda d, w: d.restore(1, replace(w, tokens=w.tokens + CODES)), "tokens range over"),
        (lambda d, w: d.restore(1, replace(w, tokens=w.tokens[:, :5])), "5 tokens per frame"),
        (lambda d, w: d.restore(1, Window(w.tokens.repeat(9, 1), torch.zeros(8), 8, 0)), "give 1..4 frames"),
        (lambda d, w: d.restore(1, Window(w.tokens.repeat(2, 1), torch.zeros(0), 1, 0)), "one action fewer"),
        (lambda d, w: d.restore(1, Window(w.tokens.repeat(2, 1), torch.tensor([5]), 1, 0)), "actions 5..5"),
        (lambda d, w: (d.begin(0, 0), d.begin(0, 0)), "still drawing"),
    ],
)
def test_wrong_requests_are_refused_with_the_value(make_world, clip, act, words):
    world = make_world()
    decoder = Decoder(world, 2, SamplerConfig(steps=2))
    window = world.prompt_window(clip(1, 1)[0])
    decoder.restore(0, window)
    with pytest.raises(ModelError, match=words):
        act(decoder, window)


def test_rolling_needs_a_model_trained_for_it(make_world):
    with pytest.raises(ModelError, match="window is 4 of 4 frames"):
        Decoder(make_world(), 1, SamplerConfig(policy="rolling"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"steps": 0}, "steps is 0"), ({"temperature": -1}, "temperature is -1"), ({"top_k": -2}, "top_k is -2"),
     ({"order": "best"}, "order is 'best'"), ({"policy": "all"}, "policy is 'all'")],
)  # fmt: skip
def test_wrong_sampler_settings_are_named(changes, words):
    with pytest.raises(ModelError, match=words):
        SamplerConfig(**changes)
