import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.attention import Clock
from models.config import ModelError, TokenizerConfig
from models.tokenizer import patchify, to_uint8, unpatchify

SHAPES = {
    "st": ({}, {}),
    "per patch": ({"attention": "none"}, {"attention": "space"}),
    "vit": ({"attention": "space"}, {"attention": "space"}),
    "c-vivit": ({"attention": "full"}, {"attention": "full"}),
}


@given(h=st.integers(1, 11), w=st.integers(1, 11), patch=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_patches_put_together_are_the_frames(h, w, patch):
    frames = torch.randint(0, 256, (2, 3, h, w, 3), dtype=torch.uint8)
    patches = patchify(frames, patch)
    assert patches.shape == (2, 3, -(-h // patch) * -(-w // patch), patch * patch * 3)
    assert torch.equal(to_uint8(unpatchify(patches, patch, h, w)), frames)


def test_padding_repeats_the_edge_and_reading_order_is_rows_first():
    frames = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3, 1).expand(1, 1, 3, 3, 3).contiguous()
    patches = (patchify(frames, 2) * 255).round().view(4, 2, 2, 3)[..., 0]
    assert patches[0].tolist() == [[0, 1], [3, 4]]
    assert patches[1].tolist() == [[2, 2], [5, 5]]
    assert patches[3].tolist() == [[8, 8], [8, 8]]


def test_paper_frames_are_padded_to_920_tokens():
    cfg = TokenizerConfig(height_px=90, width_px=160, patch=4)
    assert (cfg.rows, cfg.columns, cfg.tokens) == (23, 40, 920)


def overfit(model, batch: dict[str, torch.Tensor], steps: int, rate: float = 3e-3) -> list[dict[str, float]]:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    history = []
    for step in range(steps):
        model.train().begin_step(step, steps)
        loss, metrics = model(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.end_step()
        history.append({k: float(v) for k, v in metrics.items()})
    return history


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("st", "ema"), ("st", "vq"), ("vit", "cosine"), ("st", "fsq"), ("per patch", "ema"), ("c-vivit", "ema")],
)
def test_it_overfits_one_batch(make_tokenizer, clip, shape, kind):
    codes = {"size": 64, "dim": 6} if kind != "fsq" else {"size": 64, "dim": 6, "levels": (2,) * 6}
    encoder, decoder = SHAPES[shape]
    model = make_tokenizer(
        codebook={"kind": kind, "decay": 0.9} | codes, encoder={"width": 32} | encoder, decoder={"width": 32} | decoder
    )
    colours = torch.randint(0, 256, (2, 4, 3, 3, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    frames = colours.repeat_interleave(4, 2).repeat_interleave(4, 3)
    history = overfit(model, {"frames": frames, "key": torch.arange(2)}, 120, 5e-3)
    assert history[-1]["psnr"] > history[0]["psnr"] + 4
    assert history[-1]["mse"] < 0.45 * float(frames.float().div(255).var())
    assert history[-1]["perplexity"] > 5


def test_every_weight_gets_a_gradient(make_tokenizer, clip):
    model = make_tokenizer(codebook={"kind": "vq"}, encoder={"layers": 4}, decoder={"layers": 3}).train()
    model.begin_step(5, 10)
    model({"frames": clip(), "key": torch.arange(2)})[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("shape", list(SHAPES))
def test_streaming_encodes_and_decodes_as_the_whole_window(make_tokenizer, clip, shape):
    encoder, decoder = SHAPES[shape]
    model = make_tokenizer(encoder=encoder, decoder=decoder).double().eval()
    frames = clip(2, 4)
    tokens = model.encode(frames)
    decoded = model.decode(tokens)
    reading, writing = (part.caches(2, 9, 4) for part in (model.encoder, model.decoder))
    with torch.no_grad():
        for t in range(4):
            at = torch.full((2,), t)
            clock = Clock.at(slice(0, 2), at, torch.zeros(2, dtype=torch.int64), 4, 4, 8, torch.float64)
            assert torch.equal(model.encoder_step(frames[:, t], reading, clock), tokens[:, t])
            assert torch.equal(model.decoder_step(tokens[:, t], writing, clock), decoded[:, t])


def test_a_per_patch_encoder_moves_tokens_with_the_picture(make_tokenizer, clip):
    model = make_tokenizer(encoder={"attention": "none"}).eval()
    frames = clip(1, 2)
    moved = frames.roll(4, dims=3)
    before, after = (model.encode(f).view(1, 2, 3, 3) for f in (frames, moved))
    assert torch.equal(before.roll(1, dims=3), after)


def test_encoding_does_not_change_the_codebook(make_tokenizer, clip):
    model = make_tokenizer().train()
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.encode(clip())
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda m, f: m.encode(f.float()), "frames of torch.float32; give uint8"),
        (lambda m, f: m.encode(f[0]), r"shape \(4, 12, 12, 3\); give \(B, T, 12, 12, 3\)"),
        (lambda m, f: m.encode(f[:, :, :8]), "shape .2, 4, 8, 12, 3."),
        (lambda m, f: m.encode(f[..., :1]), "shape .2, 4, 12, 12, 1."),
        (lambda m, f: m.decode(torch.full((1, 1, 9), 16)), "tokens range over 16..16"),
        (lambda m, f: m.decode(torch.full((1, 1, 9), -1)), "tokens range over -1..-1"),
        (lambda m, f: m.decode(torch.zeros(1, 1, 8, dtype=torch.int64)), "8 tokens per frame; this tokenizer makes 9"),
        (lambda m, f: m({"frames": f[:, :, :, :4], "key": torch.arange(2)}), "resized to this world's size"),
    ],
)
def test_wrong_inputs_are_named(make_tokenizer, clip, act, words):
    with pytest.raises(ModelError, match=words):
        act(make_tokenizer(), clip())
