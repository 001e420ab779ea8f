import pytest
import torch

from models.config import ModelError
from models.metrics import mutual_information, perplexity
from models.world import CoTraining


def moving_squares(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames (count, 4, 12, 12, 3) of a bright square that moves by an action in 0..2 (left, stay, right); actions."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(3, 6, (count,), generator=g)
    actions = torch.randint(0, 3, (count, 3), generator=g)
    frames = torch.full((count, 4, 12, 12, 3), 40, dtype=torch.uint8)
    for i in range(count):
        at = int(x[i])
        for t in range(4):
            frames[i, t, 4:8, at : at + 4] = 220
            at += 0 if t == 3 else int(actions[i, t]) - 1
    return frames, actions


def learn(model, steps: int = 160) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        frames, _ = moving_squares(16, step)
        model.train().begin_step(step, steps)
        loss, _ = model({"frames": frames, "key": torch.arange(16) + 16 * step})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.end_step()
    model.eval()


def test_it_finds_actions_nobody_told_it(make_actions, transformer):
    wide = transformer(width=32)
    model = make_actions(codebook={"warmup_share": 0.4}, encoder=wide, decoder=wide)
    learn(model, steps=320)
    frames, truth = moving_squares(128, 10_000)
    found = model.infer(frames)
    assert perplexity(found, 3) > 1.5
    # seeds end between 0.3 (left and right found, "stay" in both) and 1; actions that mean nothing have 0.01
    assert mutual_information(found.flatten(), truth.flatten())[0] > 0.2


def test_the_collapsed_model_is_seen_to_be_collapsed(make_actions):
    model = make_actions()
    with torch.no_grad():
        model.codebook.codes[1:] += 1e3
    frames, truth = moving_squares(32, 0)
    found = model.eval().infer(frames)
    assert perplexity(found, 3) == 1
    assert mutual_information(found.flatten(), truth.flatten())[0] == 0


VARIANTS = {
    "residual": {},
    "plain": {"residual": False, "difference": False},
    "tokens": {"source": "tokens", "vocabulary": 16},
    "contrast": {"contrast": 0.5},
    "two levels": {"coarse": 2, "codebook": {"size": 6}},
}


def batch_of(clip, count: int = 4) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 16, (count, 4, 9), generator=torch.Generator().manual_seed(1))
    return {"frames": clip(count), "tokens": tokens, "key": torch.arange(count)}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_overfits_one_batch(make_actions, clip, variant):
    model = make_actions(**VARIANTS[variant])
    batch, optimizer = batch_of(clip, 2), torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for step in range(80):
        model.train().begin_step(step, 80)
        loss, metrics = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.end_step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    assert all(torch.isfinite(v) and not v.requires_grad for v in metrics.values())
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_cotrains_and_infers(make_actions, make_dynamics, clip, variant):
    actions = make_actions(**VARIANTS[variant])
    both = CoTraining(actions, make_dynamics(actions=actions.cfg.codebook.size)).train()
    batch = batch_of(clip)
    for step in range(4):
        both.begin_step(step, 4)
        loss, metrics = both(batch)
        loss.backward()
        both.end_step()
        assert ("dynamics/loss" in metrics) == (step > (1 if variant == "two levels" else 0))
    found = actions.infer(batch["frames"], batch["tokens"])
    assert found.shape == (4, 3)
    assert 0 <= found.min() <= found.max() < actions.cfg.codebook.size


def test_an_action_depends_on_frames_up_to_the_next_only(make_actions, clip):
    model = make_actions().eval()
    frames = clip(1)
    other = frames.clone()
    other[:, 3] = 255 - other[:, 3]
    with torch.no_grad():
        gap = (
            model.encodings(model.observe({"frames": frames})) - model.encodings(model.observe({"frames": other}))
        ).abs()
    assert (gap.amax(dim=(0, 2)) > 1e-6).tolist() == [False, False, True]


def test_the_prediction_sees_the_past_and_its_action_only(make_actions, clip):
    model = make_actions().double().eval()
    with torch.no_grad():
        model.head.weight.normal_()
        actions, seen = model.quantized({"frames": clip(1)})
        seen, other = seen.double(), actions.vectors.double().clone()
        other[:, 1] += 1
        a = model.predict(seen[:, :-1], actions.vectors.double())
        b = model.predict(seen[:, :-1], other)
    assert ((a - b).abs().amax(dim=(0, 2, 3)) > 1e-9).tolist() == [False, True, True]


def test_the_residual_decoder_starts_by_copying(make_actions, clip):
    model = make_actions().train()
    model.begin_step(0, 10)
    _, metrics = model({"frames": clip(), "key": torch.arange(2)})
    assert float(metrics["gain_db"]) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda m, f: m.infer(f[:, :1]), "got 1 frame; an action lies between two frames"),
        (lambda m, f: m.infer(f.int()), "frames of torch.int32"),
        (lambda m, f: m.infer(f[:, :, :, :6]), "the latent action model got frames of shape"),
    ],
)
def test_wrong_inputs_are_named(make_actions, clip, act, words):
    with pytest.raises(ModelError, match=words):
        act(make_actions(), clip())


def test_a_model_that_watches_tokens_asks_for_them(make_actions, clip):
    with pytest.raises(ModelError, match="watches tokens; give the frames' tokens"):
        make_actions(**VARIANTS["tokens"]).infer(clip())
    with pytest.raises(ModelError, match="vocabulary is 0"):
        make_actions(source="tokens")
    with pytest.raises(ModelError, match="coarse is 2; it must divide the 3 actions"):
        make_actions(coarse=2)
