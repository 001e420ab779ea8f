import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import CodebookConfig, ModelError
from models.quantizer import Codebook, TwoLevels, kmeans

KINDS = {
    "ema": {"kind": "ema"},
    "vq": {"kind": "vq"},
    "cosine": {"kind": "cosine"},
    "fsq": {"kind": "fsq", "levels": (4, 3, 2), "size": 24, "dim": 3},
}


def book(kind: str, **changes) -> Codebook:
    return Codebook(CodebookConfig(**({"size": 8, "dim": 3, "decay": 0.8} | KINDS[kind] | changes)))


def blobs(step: int, groups: int = 8, dim: int = 3) -> torch.Tensor:
    """Encodings (4, 32, dim) around fixed centres."""
    centres = 4 * torch.randn(groups, dim, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(step)
    return centres[torch.randint(groups, (4, 32), generator=g)] + 0.1 * torch.randn(4, 32, dim, generator=g)


def train(model, steps: int = 40, data=blobs) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters()] or [torch.zeros(1)], 0.05)
    for step in range(steps):
        model.train().begin_step(step, steps)
        found = model(data(step), torch.arange(4) + 4 * step)
        optimizer.zero_grad()
        if found.loss.requires_grad:
            found.loss.backward()
            optimizer.step()
        model.end_step()
    model.eval()


@pytest.mark.parametrize("kind", ["ema", "vq", "cosine"])
def test_codes_find_the_clusters_of_their_encodings(kind):
    model = book(kind)
    train(model)
    z = blobs(1000)
    if kind == "cosine":
        z = torch.nn.functional.normalize(z, dim=-1)
    codes = model.nearest(z)
    assert model.metrics(codes)["perplexity"] > 5
    assert (model.lookup(codes) - z).square().sum(-1).mean() < 0.1 * z.square().sum(-1).mean()


@pytest.mark.parametrize("kind", list(KINDS))
def test_codes_vectors_and_lookup_agree(kind):
    model = book(kind).eval()
    found = model(torch.randn(2, 5, model.cfg.dim))
    assert found.codes.dtype == torch.int64
    assert 0 <= found.codes.min() <= found.codes.max() < model.cfg.size
    torch.testing.assert_close(model.lookup(found.codes), found.vectors)
    again = model.nearest(model.lookup(found.codes)) if kind != "fsq" else found.codes
    assert torch.equal(again, found.codes)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_gradient_passes_straight_through(kind):
    z = torch.randn(2, 5, 3, requires_grad=True)
    book(kind).eval()(z).vectors.sum().backward()
    assert (z.grad.abs() > 0).all() or kind == "cosine"
    assert z.grad.abs().sum() > 0


@given(levels=st.lists(st.integers(2, 7), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_fsq_reaches_every_code_and_no_other(levels):
    size = int(torch.tensor(levels).prod())
    model = Codebook(CodebookConfig(size=size, dim=len(levels), kind="fsq", levels=tuple(levels))).eval()
    codes = torch.arange(size)
    vectors = model.lookup(codes)
    assert len(vectors.unique(dim=0)) == size
    wide = model(4 * torch.randn(1, 20000, len(levels)))
    torch.testing.assert_close(model.lookup(wide.codes), wide.vectors, atol=1e-5, rtol=1e-5)
    assert 0 <= wide.codes.min() <= wide.codes.max() < size


def test_warm_up_passes_encodings_on_and_ends_with_codes_at_their_centres():
    model = book("ema", warmup_share=0.5, channel=0)
    z = blobs(0).requires_grad_()
    for step in range(5):
        model.train().begin_step(step, 10)
        assert model.continuous
        assert torch.equal(model(z, torch.arange(4)).vectors, z)
        before = model.codes.clone()
        model.end_step()
        assert torch.equal(before, model.codes) == (step < 4)
    model.begin_step(5, 10)
    assert not model.continuous
    gap = model(z, torch.arange(4)).vectors - z
    assert gap.square().sum(-1).mean() < 0.1


def test_the_warm_up_channel_adds_unit_noise_from_the_keys_and_prices_energy():
    model = book("ema", warmup_share=0.5, channel=0.1)
    model.train().begin_step(0, 10)
    z = torch.zeros(200, 20, 3)
    found = model(z, torch.arange(200))
    assert float(found.vectors.mean()) == pytest.approx(0, abs=0.03)
    assert float(found.vectors.std()) == pytest.approx(1, abs=0.03)
    assert float(found.loss) == 0
    torch.testing.assert_close(model(z[7:8], torch.tensor([7])).vectors, found.vectors[7:8])
    assert float(model(z + 2, torch.arange(200)).loss) == pytest.approx(0.1 / 2 * 12)


def test_a_step_in_parts_equals_the_step_at_once():
    """Micro-batches, and so world sizes, do not change what end_step does."""
    whole, parts = book("ema"), book("ema")
    for step in range(6):
        z, key = blobs(step), torch.arange(4) + 4 * step
        for model, chunks in ((whole, 1), (parts, 4)):
            model.train().begin_step(step, 6)
            for rows, keys in zip(z.chunk(chunks), key.chunk(chunks), strict=True):
                model(rows, keys)
            model.end_step()
    torch.testing.assert_close(whole.codes, parts.codes)
    assert set(whole.state_dict()) == {"codes", "usage", "sums"}


def test_the_pool_holds_each_encoding_once():
    model, kept = book("ema"), []
    model._revive = kept.append
    model.train().begin_step(3, 9)
    model(blobs(0), torch.arange(4))
    model.end_step()
    assert len(kept[0]) == 4 * 32
    assert len(kept[0].unique(dim=0)) == 4 * 32


def in_parts(rank: int, folder: str) -> None:
    """One of two processes: half of each step's samples."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = book("ema", warmup_share=0.3)
    for step in range(6):
        model.train().begin_step(step, 6)
        model(blobs(step)[2 * rank : 2 * rank + 2], torch.arange(4)[2 * rank : 2 * rank + 2] + 4 * step)
        model.end_step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_hold_the_codes_of_one(tmp_path):
    torch.multiprocessing.spawn(in_parts, args=(str(tmp_path),), nprocs=2)
    one = book("ema", warmup_share=0.3)
    for step in range(6):
        one.train().begin_step(step, 6)
        one(blobs(step), torch.arange(4) + 4 * step)
        one.end_step()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in one.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


def test_resuming_from_the_state_equals_going_on():
    straight, first = book("ema"), book("ema")
    for step in range(8):
        if step == 4:
            second = book("ema")
            second.load_state_dict(first.state_dict())
            first = second
        for model in (straight, first):
            model.train().begin_step(step, 8)
            model(blobs(step), torch.arange(4) + 4 * step)
            model.end_step()
    assert torch.equal(straight.codes, first.codes)


def test_inference_leaves_no_trace():
    model = book("ema").train()
    model.begin_step(3, 5)
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.nearest(torch.randn(4, 3))
    model.eval()(torch.randn(4, 3))
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name])


def test_codes_stay_in_full_precision_when_the_model_does_not():
    model = book("ema").bfloat16()
    assert model.codes.dtype == torch.float32
    assert model(torch.randn(1, 4, 3, dtype=torch.bfloat16)).vectors.dtype == torch.bfloat16
    assert book("ema").double().codes.dtype == torch.float64


def test_two_levels_refine_a_group():
    model = TwoLevels(CodebookConfig(size=8, dim=3, decay=0.8), 2)
    train(model, 60)
    z = blobs(1000)
    codes = model.nearest(z)
    assert 0 <= codes.min() <= codes.max() < 8
    coarse = (model.coarse.lookup(codes // 4) - z).square().sum(-1).mean()
    both = (model.lookup(codes) - z).square().sum(-1).mean()
    assert both < 0.4 * coarse
    found = model.eval()(z)
    torch.testing.assert_close(found.vectors, model.lookup(found.codes))


def test_kmeans_finds_centres_and_is_deterministic():
    points = blobs(5).flatten(0, 1)
    centres = kmeans(points, 8)
    assert torch.cdist(points, centres).min(-1).values.mean() < 0.5
    assert torch.equal(centres, kmeans(points, 8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"kind": "best"}, "kind is 'best'"), ({"warmup_share": 1.0}, "warmup_share is 1.0"),
     ({"kind": "fsq", "levels": (3, 3)}, "fsq needs dim=32 levels"), ({"decay": 0}, "decay is 0")],
)  # fmt: skip
def test_wrong_settings_are_named(changes, words):
    with pytest.raises(ModelError, match=words):
        CodebookConfig(**changes)
