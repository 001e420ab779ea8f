"""Passes of fixed shapes over all slots draw what the ordinary ones draw; compiled once, they stay compiled."""

import pytest
import torch

from models.config import SamplerConfig
from models.graph import decoding_pass
from models.sampler import Decoder

FRAMES = 4


def story(decoder: Decoder, world, clip) -> list[tuple[int, list[int], torch.Tensor]]:
    """Sessions join, play at different steps, fork, idle, leave and return -> every frame that came out."""
    frames = []

    def turn(passes: int) -> None:
        for _ in range(passes):
            frames.extend((f.slot, f.tokens.tolist(), f.frame) for f in decoder.advance())

    decoder.restore(0, world.prompt_window(clip(1, 2)[0], 1, "two words"))
    decoder.begin(0, 1)
    turn(2)
    decoder.restore(2, world.prompt_window(clip(1, 1)[0], 2))
    decoder.begin(2, 0)
    turn(8)
    decoder.fork(0, 1)
    for action in (2, 1, 0, 2, 1):  # past the window's end
        decoder.begin(1, action)
        turn(1)
        decoder.begin(0, action)
        turn(7)
    decoder.release(2)
    decoder.restore(2, decoder.window(1))
    for slot in (2, 1):
        decoder.begin(slot, 1)
    turn(9)
    return frames


@pytest.mark.parametrize("policy", ["epoch", "reprefill", "rolling"])
@pytest.mark.parametrize("action_mode", ["additive", "prepended", "film"])
@pytest.mark.parametrize("order", ["confidence", "random", "halton"])
def test_it_draws_what_ordinary_passes_draw(make_world, clip, policy, action_mode, order):
    window = 2 if policy == "rolling" else FRAMES
    world = make_world(
        dynamics={"action_mode": action_mode, "words": 2, "transformer": {"window": window}},
        tokenizer={"decoder": {"window": window}},
        double=True,
    )
    sampler = SamplerConfig(steps=4, policy=policy, order=order)
    ordinary, fixed = (story(Decoder(world, 3, sampler, graph=graph), world, clip) for graph in (False, True))
    assert len(ordinary) == 14
    assert [(slot, tokens) for slot, tokens, _ in fixed] == [(slot, tokens) for slot, tokens, _ in ordinary]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(fixed, ordinary, strict=True))


def test_it_counts_the_passes_of_sessions_alone(make_world, clip):
    world = make_world()
    decoder = Decoder(world, 3, SamplerConfig(steps=4), graph=True)
    decoder.restore(1, world.prompt_window(clip(1, 1)[0]))
    before = decoder.passes
    decoder.begin(1, 0)
    while decoder.busy:
        decoder.advance()
    assert decoder.passes - before == 5


def test_a_pass_compiles_whole_and_once(make_world, clip):
    world = make_world()
    decoder = Decoder(world, 2, SamplerConfig(steps=3))
    torch._dynamo.reset()
    compiled = torch.compile(decoding_pass, backend="eager", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        compiled(decoder, torch.zeros(2, 8, dtype=torch.int64))
        with torch.compiler.set_stance("fail_on_recompile"):
            for step in range(4):
                decoder.restore(0, world.prompt_window(clip(1, 1, step)[0], step))
                decoder.begin(0, step % 3)
                facts = torch.tensor([decoder._facts(slot) for slot in range(2)])
                compiled(decoder, facts)
                mine = decoder.current.clone()
                decoder.current[0] = world.dynamics.mask_token
                decoding_pass(decoder, facts)
                assert torch.equal(mine, decoder.current)
                decoder.release(0)


@pytest.mark.gpu
def test_a_captured_graph_draws_what_ordinary_passes_draw(make_world, clip):
    world = make_world(double=True)
    for part in (world.tokenizer, world.actions, world.dynamics):
        part.to("cuda")
    sampler = SamplerConfig(steps=4)
    ordinary, captured = (story(Decoder(world, 3, sampler, graph=graph), world, clip) for graph in (False, True))
    assert [(slot, tokens) for slot, tokens, _ in captured] == [(slot, tokens) for slot, tokens, _ in ordinary]
