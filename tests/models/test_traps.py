"""Ten traps that other implementations of Genie fell into; where it can be done, the defect is put back and caught."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import SamplerConfig
from models.dynamics import Dynamics
from models.maskgit import draw, reveal_counts
from models.metrics import perplexity
from models.noise import uniform_for
from models.quantizer import Codebook
from models.sampler import Decoder
from models.world import CoTraining

FRAMES, CODES, ACTIONS, TOKENS = 4, 16, 3, 9


def random_batch(seed: int, batch: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(0, CODES, (batch, FRAMES, TOKENS), generator=g),
        "actions": torch.randint(0, ACTIONS, (batch, FRAMES - 1), generator=g),
        "key": torch.arange(batch) + 1000 * seed,
    }


# 1 ------------------------------------------------------------------------------------------------------------------


def loss_after_random_tokens(model: Dynamics, steps: int = 60) -> float:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    last = []
    for step in range(steps):
        loss, _ = model.train()(random_batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last.append(loss.item())
    return sum(last[-10:]) / 10


@pytest.mark.parametrize("masking", ["genie", "per_frame", "ctf"])
def test_trap_1_random_tokens_cannot_be_learnt(make_dynamics, masking):
    assert loss_after_random_tokens(make_dynamics(masking=masking)) == pytest.approx(math.log(CODES), abs=0.12)


def test_trap_1_targets_overwritten_by_the_mask_would_be_caught(make_dynamics, monkeypatch):
    score = Dynamics.score
    monkeypatch.setattr(Dynamics, "score", lambda self, x, y, m: score(self, x, torch.where(m, 0, y), m))
    assert loss_after_random_tokens(make_dynamics()) < 0.5


# 2 ------------------------------------------------------------------------------------------------------------------


def cotrain(make_actions, make_dynamics, clip, kind: str) -> CoTraining:
    both = CoTraining(make_actions(codebook={"kind": kind}), make_dynamics()).train()
    batch = random_batch(1, 4) | {"frames": clip(4)}
    optimizer = torch.optim.SGD(both.parameters(), 1e-2)
    for step in (0, 1):
        both.zero_grad()
        both.begin_step(step, 10)
        both(batch)[0].backward()
        if step == 0:
            optimizer.step()
            both.end_step()
    return both


def test_trap_2_cotraining_keeps_the_action_models_own_loss(make_actions, make_dynamics, clip):
    both = cotrain(make_actions, make_dynamics, clip, "vq")
    assert float(both.actions.codebook.codes.grad.abs().sum()) > 0
    silent = [n for n, p in both.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_trap_2_codes_follow_their_encodings_in_cotraining(make_actions, make_dynamics, clip):
    both = cotrain(make_actions, make_dynamics, clip, "ema")
    before = both.actions.codebook.codes.clone()
    both.end_step()
    assert not torch.equal(before, both.actions.codebook.codes)


def test_trap_2_a_dropped_decoder_loss_would_be_caught(make_actions, make_dynamics, clip, monkeypatch):
    from models.actions import LatentActionModel

    loss = LatentActionModel.loss
    monkeypatch.setattr(LatentActionModel, "loss", lambda self, a, p: (a.vectors.sum() * 0, loss(self, a, p)[1]))
    both = cotrain(make_actions, make_dynamics, clip, "vq")
    assert both.actions.codebook.codes.grad is None
    assert both.actions.head.weight.grad is None


def test_trap_2_no_gradient_flows_from_dynamics_into_actions(make_actions, make_dynamics, clip):
    both = cotrain(make_actions, make_dynamics, clip, "vq")
    alone = {n: p.grad.clone() for n, p in both.actions.named_parameters()}
    both.actions.zero_grad()
    both.actions({"frames": clip(4), "key": random_batch(1, 4)["key"]})[0].backward()
    for name, weight in both.actions.named_parameters():
        torch.testing.assert_close(weight.grad, alone[name])


# 3 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 9, 64, 920])
@pytest.mark.parametrize("steps", [1, 2, 8, 25])
def test_trap_3_reveal_counts_rise_to_all(tokens, steps):
    counts = reveal_counts(tokens, steps)
    assert len(counts) == steps
    assert counts[-1] == tokens
    assert all(a <= b for a, b in zip(counts, counts[1:], strict=False))
    if tokens >= 4 * steps:
        assert counts[0] >= 1
        assert all(a < b for a, b in zip(counts, counts[1:], strict=False))


def spread(sampler, temperature: float) -> float:
    logits = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1)).mul(3).expand(1, 4000, 32)
    tokens, _ = sampler(logits, uniform_for(torch.tensor([5]), 1, 4000), temperature)
    return perplexity(tokens, 32)


def test_trap_3_temperature_changes_what_is_drawn():
    assert spread(draw, 0) == pytest.approx(1)
    assert spread(draw, 0.3) < 0.6 * spread(draw, 1.0) < 0.6 * spread(draw, 3.0)


def test_trap_3_temperature_on_probabilities_would_be_caught():
    def defect(logits, noise, temperature):
        share = logits.softmax(-1) / temperature
        return draw((share / share.sum(-1, keepdim=True)).log(), noise, 1.0)

    assert spread(defect, 0.3) == pytest.approx(spread(defect, 3.0), rel=0.05)


# 4 ------------------------------------------------------------------------------------------------------------------


def test_trap_4_new_frames_are_decoded_with_their_history_and_never_encoded_again(make_world, clip, monkeypatch):
    world = make_world()
    state = world.start(clip(1, 2)[0], 3, SamplerConfig(steps=3))
    monkeypatch.setattr(type(world.tokenizer), "encode", lambda *_: pytest.fail("decoded pixels were tokenized again"))
    state, frame = world.step(state, 1)
    tokens = state.window.tokens[None]
    assert torch.equal(frame, world.tokenizer.decode(tokens)[0, -1])
    assert not torch.equal(frame, world.tokenizer.decode(tokens[:, -1:])[0, 0])


# 5 ------------------------------------------------------------------------------------------------------------------


def test_trap_5_each_sample_has_its_own_mask_rate_from_a_half_to_one(make_dynamics):
    model = make_dynamics(rows=20, columns=20)
    hidden = model.masked(torch.arange(400), FRAMES)
    assert not hidden[:, 0].any()
    rate = hidden[:, 1:].double().mean(dim=(1, 2))
    assert 0.45 < float(rate.min()) < 0.53
    assert 0.97 < float(rate.max()) <= 1
    assert float(rate.std()) == pytest.approx(0.5 / math.sqrt(12), rel=0.15)


def test_trap_5_the_mask_has_its_own_token(make_dynamics):
    model = make_dynamics()
    assert model.mask_token == CODES
    assert model.embed.weight.shape[0] == CODES + 1
    assert model.head.weight.shape[0] == CODES


def test_trap_5_drawn_tokens_are_fed_back(make_world, clip, monkeypatch):
    world = make_world()
    seen = []
    enter = Dynamics.enter
    monkeypatch.setattr(
        Dynamics, "enter", lambda self, tokens, *a, **k: (seen.append(tokens.clone()), enter(self, tokens, *a, **k))[1]
    )
    decoder = Decoder(world, 1, SamplerConfig(steps=4))
    decoder.restore(0, world.prompt_window(clip(1, 1)[0]))
    decoder.begin(0, 0)
    seen.clear()
    finished = [f for _ in range(4) for f in decoder.advance()]
    known = [int((tokens != CODES).sum()) for tokens in seen]
    assert known == [0, *reveal_counts(TOKENS, 4)[:-1]]
    for tokens in seen:
        kept = tokens[0] != CODES
        assert torch.equal(tokens[0][kept], finished[0].tokens[kept])


@pytest.mark.parametrize("mode", ["additive", "prepended", "film"])
def test_trap_5_a_batch_of_one_works_and_the_players_action_matters(make_world, clip, mode):
    world = make_world(dynamics={"action_mode": mode})
    with torch.no_grad():
        world.dynamics.action_embed.weight.mul_(4)
        for block in world.dynamics.transformer.blocks:
            if block.feed.film is not None:
                block.feed.film.weight.mul_(4)
    start = world.start(clip(1, 1)[0], 1, SamplerConfig(steps=3))
    frames = [world.step(start, action)[1] for action in range(ACTIONS)]
    assert not torch.equal(frames[0], frames[1])
    assert not torch.equal(frames[1], frames[2])
    loss, _ = world.dynamics.train()(random_batch(0, 1))
    assert torch.isfinite(loss)


# 6 ------------------------------------------------------------------------------------------------------------------


def use(book: Codebook, revive: bool) -> float:
    """Perplexity after training on lively encodings from codes that all lie far away but one."""
    with torch.no_grad():
        book.codes[1:] += 100
        book.sums.copy_(book.codes * book.usage[:, None])
    if not revive:
        book._revive = lambda live: None
    for step in range(1, 40):
        book.begin_step(step, 40)
        z = torch.randn(8, 32, 4, generator=torch.Generator().manual_seed(step))
        codes = book(z, torch.arange(8) + 8 * step).codes
        book.end_step()
    return float(book.metrics(codes)["perplexity"])


def test_trap_6_dead_codes_are_revived_and_use_is_reported(make_tokenizer):
    assert use(make_tokenizer(codebook={"decay": 0.8}).codebook.train(), revive=True) > CODES / 2
    assert use(make_tokenizer(codebook={"decay": 0.8}).codebook.train(), revive=False) == pytest.approx(1)


def test_trap_6_the_decoder_depends_on_the_action(make_actions, clip):
    model = make_actions()
    with torch.no_grad():
        model.head.weight.normal_()
    frames = clip()
    codes, patches = model.quantized({"frames": frames})
    one = model.predict(patches[:, :-1], codes.vectors)
    other = model.predict(patches[:, :-1], codes.vectors + torch.randn_like(codes.vectors))
    assert float((one - other).abs().mean()) > 1e-3


# 7 ------------------------------------------------------------------------------------------------------------------


def frames_moved_by_action(model: Dynamics, action: int) -> list[bool]:
    """Which frames' logits change when one action changes."""
    batch = random_batch(0, 2)
    other = batch["actions"].clone()
    other[:, action] = (other[:, action] + 1) % ACTIONS
    with torch.no_grad():
        gap = (model.logits(batch["tokens"], batch["actions"]) - model.logits(batch["tokens"], other)).abs()
    return (gap.amax(dim=(0, 2, 3)) > 1e-6).tolist()


@pytest.mark.parametrize("mode", ["additive", "prepended", "film"])
@pytest.mark.parametrize("action", range(FRAMES - 1))
def test_trap_7_an_action_moves_the_frame_it_leads_to_and_no_earlier_one(make_dynamics, mode, action):
    moved = frames_moved_by_action(make_dynamics(action_mode=mode, transformer={"layers": 4}).eval(), action)
    assert moved == [t >= action + 1 for t in range(FRAMES)]


def test_trap_7_actions_off_by_one_would_be_caught(make_dynamics, monkeypatch):
    pad = torch.nn.functional.pad
    monkeypatch.setattr(Dynamics, "with_first", lambda self, a: pad(a, (0, 1), value=self.no_action))
    assert frames_moved_by_action(make_dynamics().eval(), 0) != [False, True, True, True]


# 8 ------------------------------------------------------------------------------------------------------------------


def test_trap_8_corruption_touches_the_context_and_tells_its_level(make_dynamics):
    model = make_dynamics(corruption=0.4)
    batch = random_batch(3, 200)
    dirty, level = model.corrupted(batch["tokens"], batch["key"])
    share = (dirty != batch["tokens"]).double().mean(dim=(1, 2))
    assert float(share[level == 0].mean()) < 0.05 < 0.25 < float(share[level == 9].mean()) < 0.45
    clean, none = make_dynamics().corrupted(batch["tokens"], batch["key"])
    assert none is None
    assert torch.equal(clean, batch["tokens"])
    with torch.no_grad():
        args = batch["tokens"][:2], batch["actions"][:2]
        assert not torch.equal(model.logits(*args, torch.tensor([0, 0])), model.logits(*args, torch.tensor([9, 9])))
        assert torch.equal(model.logits(*args, torch.tensor([0, 0])), model.logits(*args))


def test_trap_8_complete_teacher_forcing_sees_what_generation_sees(make_dynamics):
    """A masked frame's logits equal those of a window whose past is complete, for every frame at once."""
    model = make_dynamics(masking="ctf", transformer={"layers": 4}).double().eval()
    batch = random_batch(4, 2)
    hidden = model.masked(batch["key"], FRAMES)
    guess = torch.where(hidden, model.mask_token, batch["tokens"])
    both = model._two_streams(batch["tokens"], guess, batch["actions"], None, None)
    for t in range(1, FRAMES):
        window = torch.cat((batch["tokens"][:, :t], guess[:, t : t + 1]), dim=1)
        torch.testing.assert_close(both[:, t - 1], model.logits(window, batch["actions"][:, :t])[:, -1])


# 9 ------------------------------------------------------------------------------------------------------------------


def test_trap_9_several_prompt_frames_carry_motion(make_world, clip):
    world = make_world()
    frames = clip(1, FRAMES)[0]
    for n in range(1, FRAMES + 1):
        window = world.prompt_window(frames[-n:])
        assert window.tokens.shape == (n, TOKENS)
        assert window.actions.shape == (n - 1,)
        if n > 1:
            assert torch.equal(window.actions, world.actions.infer(frames[None, -n:])[0])
        state, frame = world.step(world.start(frames[-n:], 0, SamplerConfig(steps=2)), 0)
        assert frame.shape == (12, 12, 3)


# 10 -----------------------------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.names):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
def test_trap_10_refinement_never_waits_for_the_device(make_world, clip, order):
    world = make_world()
    decoder = Decoder(world, 2, SamplerConfig(steps=6, order=order, top_k=4))
    for slot in range(2):
        decoder.restore(slot, world.prompt_window(clip(1, 1)[0], slot))
        decoder.begin(slot, slot)
    with HostReads() as reads:
        for _ in range(5):
            assert decoder.advance() == []
    assert reads.found == []
    with HostReads() as reads:
        decoder.current[0, 0].item()
    assert reads.found != []


def test_trap_10_shapes_stay_so_nothing_is_compiled_again(make_dynamics):
    model = make_dynamics().eval()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    forward = torch.compile(model.transformer, backend=count, fullgraph=True, dynamic=False)
    for step in range(4):
        batch = random_batch(step)
        x, condition = model.enter(batch["tokens"], model.with_first(batch["actions"]))
        with torch.no_grad():
            torch.testing.assert_close(forward(x, condition), model.transformer(x, condition))
    assert len(graphs) == 1
