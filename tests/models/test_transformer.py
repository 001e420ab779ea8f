"""Cached frame-by-frame features equal whole-window features, in double precision, for every kind of layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import Clock
from models.config import ModelError, TransformerConfig
from models.transformer import Transformer

shapes = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 5),
        "attention": st.sampled_from(["st", "space", "none", "full"]),
        "window": st.integers(1, 6),
        "kv_heads": st.sampled_from([0, 1, 2, 4]),
        "qk_norm": st.booleans(),
    }
)


def build(film: bool = False, **changes) -> Transformer:
    torch.manual_seed(0)
    cfg = TransformerConfig(**({"width": 24, "heads": 4, "head_size": 6, "layers": 2} | changes))
    model = Transformer(cfg, film=film).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.7)
    return model


def stream(model: Transformer, x: torch.Tensor, cond: torch.Tensor | None, cells: int, first: int = 0) -> torch.Tensor:
    """Features of a window (B, T, N, D), one frame at a time through the cache."""
    B, T, N, _ = x.shape
    caches = model.caches(B, N, cells)
    out = []
    for t in range(T):
        at = torch.full((B,), first + t)
        clock = Clock.at(
            slice(0, B), at, torch.full((B,), first), cells, model.cfg.window, model.cfg.head_size, x.dtype
        )
        condition = None if cond is None else cond[:, t]
        out.append(model.finish(model.step(x[:, t], condition, caches, clock), condition))
    return torch.stack(out, dim=1)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, film=st.booleans(), frames=st.integers(1, 7), tokens=st.integers(1, 5), batch=st.integers(1, 3))
def test_streaming_equals_the_whole_window(shape, film, frames, tokens, batch):
    model = build(film, **shape)
    x = torch.randn(batch, frames, tokens, 24, dtype=torch.float64)
    cond = torch.randn(batch, frames, 24, dtype=torch.float64) if film else None
    with torch.no_grad():
        whole = model(x, cond)
        torch.testing.assert_close(stream(model, x, cond, frames), whole, atol=1e-10, rtol=1e-10)
        # a ring no larger than the window, at a place in time far from zero: rotary positions are relative
        ring = stream(model, x, cond, model.cfg.window, first=1000)
        torch.testing.assert_close(ring, whole, atol=1e-9, rtol=1e-9)


def test_a_cache_smaller_than_the_window_would_be_caught():
    model = build(window=4)
    x = torch.randn(1, 6, 2, 24, dtype=torch.float64)
    with torch.no_grad():
        assert not torch.allclose(stream(model, x, None, 3), model(x), atol=1e-6)


@pytest.mark.parametrize(("attention", "layers"), [("st", 2), ("full", 1)])
def test_frames_depend_on_the_window_before_them_only(attention, layers):
    model = build(attention=attention, layers=layers, window=3)
    x = torch.randn(1, 6, 2, 24, dtype=torch.float64)
    other = x.clone()
    other[:, 1, :, 0] += 3
    with torch.no_grad():
        moved = (model(x) - model(other)).abs().amax(dim=(0, 2, 3)) > 1e-9
    assert moved.tolist() == [False, True, True, True, False, False]


def test_the_second_stream_sees_the_first_streams_past_and_itself():
    model = build(layers=4, window=3)
    clean, other = torch.randn(2, 1, 5, 2, 24, dtype=torch.float64)
    with torch.no_grad():
        both = model(torch.cat((clean, other), 1), two_streams=True)
        torch.testing.assert_close(both[:, :5], model(clean))
        for t in range(5):
            window = torch.cat((clean[:, :t], other[:, t : t + 1]), dim=1)
            torch.testing.assert_close(both[:, 5 + t], model(window)[:, -1])


def test_layers_are_counted_as_the_paper_counts():
    even, odd = build(layers=4), build(layers=5)
    assert [b.temporal is not None for b in even.blocks] == [True, True]
    assert [b.temporal is not None for b in odd.blocks] == [True, True, False]
    assert all(b.spatial is not None for b in odd.blocks)
    assert len(build(layers=3, attention="none").blocks) == 3


def test_recomputing_activations_changes_no_gradient():
    x = torch.randn(2, 3, 4, 24, dtype=torch.float64)
    grads = []
    for checkpointing in (False, True):
        model = build(layers=4, checkpointing=checkpointing).train()
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_grouped_heads_make_a_smaller_cache():
    sizes = [build(kv_heads=k).caches(2, 5, 7)[0].slot_bytes for k in (0, 2, 1)]
    assert sizes[0] == 2 * 5 * 4 * 7 * 6 * 8
    assert sizes == [sizes[0], sizes[0] // 2, sizes[0] // 4]


def test_bf16_weights_compute_in_bf16():
    model = build().bfloat16()
    y = model(torch.randn(1, 3, 2, 24, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 4, "kv_heads": 3}, "kv_heads is 3"),
        ({"head_size": 7}, "head_size is 7"),
        ({"layers": 0}, "layers is 0"),
        ({"attention": "both"}, "attention is 'both'"),
    ],
)
def test_wrong_settings_are_named(changes, words):
    with pytest.raises(ModelError, match=words):
        TransformerConfig(**changes)
