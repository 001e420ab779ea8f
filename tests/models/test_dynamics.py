import math

import pytest
import torch

from models.config import ModelError

FRAMES, CODES, ACTIONS, TOKENS = 4, 16, 3, 9
SETTINGS = {
    "genie": {},
    "prepended": {"action_mode": "prepended"},
    "film": {"action_mode": "film"},
    "per frame": {"masking": "per_frame"},
    "ctf": {"masking": "ctf"},
    "ctf, film, corrupted": {"masking": "ctf", "action_mode": "film", "corruption": 0.2},
    "single": {"single_share": 0.5},
    "corrupted": {"corruption": 0.2},
    "grouped": {"transformer": {"kv_heads": 1, "layers": 3}},
    "full": {"transformer": {"attention": "full"}},
    "words": {"words": 2, "text_vocabulary": 4, "action_mode": "prepended"},
}


def batch_of(count: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(0, CODES, (count, FRAMES, TOKENS), generator=g),
        "actions": torch.randint(0, ACTIONS, (count, FRAMES - 1), generator=g),
        "key": torch.arange(count),
        "text": torch.tensor([[1, 2], [3, 0]]).repeat(count // 2, 1),
    }


@pytest.mark.parametrize("name", list(SETTINGS))
def test_it_overfits_one_batch_and_every_weight_gets_a_gradient(make_dynamics, name):
    settings = dict(SETTINGS[name])
    model = make_dynamics(transformer={"width": 32} | settings.pop("transformer", {}), **settings).train()
    batch, optimizer = batch_of(), torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(70):
        model.begin_step(step, 70)
        loss, metrics = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.end_step()
        if step == 0:
            assert loss.item() == pytest.approx(math.log(CODES), abs=0.8)
    assert loss.item() < 0.5
    assert metrics["accuracy"] > 0.85
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_draws_come_from_the_keys_alone(make_dynamics):
    model = make_dynamics(corruption=0.3, single_share=0.5)
    batch = batch_of(4)
    torch.manual_seed(1)
    first = model(batch)[0]
    torch.manual_seed(2)
    assert torch.equal(first, model(batch)[0])
    assert not torch.equal(first, model(batch | {"key": batch["key"] + 100})[0])
    # a sample's mask is its own, whatever batch it stands in
    assert torch.equal(model.masked(batch["key"], FRAMES)[2:3], model.masked(batch["key"][2:3], FRAMES))


def test_masking_settings_mask_what_they_say(make_dynamics):
    key = torch.arange(300)
    per_frame = make_dynamics(masking="per_frame", rows=10, columns=10).masked(key, FRAMES)[:, 1:].double().mean(-1)
    assert float((per_frame[:, 0] - per_frame[:, 1]).abs().mean()) > 0.1
    genie = make_dynamics(rows=10, columns=10).masked(key, FRAMES)[:, 1:].double().mean(-1)
    assert float((genie[:, 0] - genie[:, 1]).abs().mean()) < 0.08
    single = make_dynamics(single_share=1.0).masked(key, FRAMES).any(-1)
    assert (single.sum(1) == 1).all()
    assert not single[:, 0].any()
    low = make_dynamics(mask_low=0.9, rows=10, columns=10).masked(key, FRAMES)[:, 1:].double().mean(dim=(1, 2))
    assert float(low.min()) > 0.85


def test_the_first_frame_has_no_action(make_dynamics):
    model = make_dynamics()
    assert model.with_first(torch.tensor([[0, 1, 2]])).tolist() == [[ACTIONS, 0, 1, 2]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.zeros(2, FRAMES, 8, dtype=torch.int64)}, r"tokens \(2, 4, 8\)"),
        ({"tokens": torch.full((2, FRAMES, TOKENS), CODES)}, "tokens in 16..16; this model knows 0..15"),
        ({"actions": torch.full((2, FRAMES - 1), ACTIONS)}, "actions in 3..3; this model knows 0..2"),
        ({"actions": torch.zeros(2, FRAMES, dtype=torch.int64)}, r"actions \(2, 4\)"),
    ],
)
def test_wrong_inputs_are_named(make_dynamics, change, words):
    with pytest.raises(ModelError, match=words):
        make_dynamics()(batch_of() | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"masking": "all"}, "masking is 'all'"), ({"action_mode": "add"}, "action_mode is 'add'"),
     ({"frames": 1}, "frames is 1"), ({"corruption": 2.0}, "corruption is 2.0"), ({"actions": 0}, "actions is 0")],
)  # fmt: skip
def test_wrong_settings_are_named(make_dynamics, change, words):
    with pytest.raises(ModelError, match=words):
        make_dynamics(**change)


def test_words_stand_before_every_frame_and_matter(make_dynamics):
    model = make_dynamics(words=2, text_vocabulary=8).eval()
    batch = batch_of()
    with torch.no_grad():
        said = [
            model.logits(batch["tokens"], batch["actions"], text=text)
            for text in (
                None,
                torch.full((len(batch["tokens"]), 2), 8),
                torch.tensor([[1, 2]]).expand(len(batch["tokens"]), 2),
            )
        ]
    assert said[0].shape == (*batch["tokens"].shape, model.cfg.vocabulary)
    assert torch.equal(said[0], said[1])
    assert not torch.allclose(said[0], said[2])


def test_a_text_is_left_out_of_some_samples(make_dynamics):
    model = make_dynamics(words=2, text_vocabulary=8)
    text = model._text({"text": torch.ones(2000, 2), "key": torch.arange(2000)})
    share = (text == 8).all(1).double().mean()
    assert 0.07 < float(share) < 0.13
    assert ((text == 8).all(1) | (text == 1).all(1)).all()
