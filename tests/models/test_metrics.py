import math

import pytest
import torch

from models import metrics


def noisy(frames: torch.Tensor, scale: float) -> torch.Tensor:
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(1)) * scale
    return (frames.float() + noise).clamp(0, 255).round().to(torch.uint8)


def ramp() -> torch.Tensor:
    x = torch.linspace(0, 255, 32)
    return (x[:, None] * 0.5 + x[None] * 0.5)[None, ..., None].expand(2, 32, 32, 3).round().to(torch.uint8).contiguous()


def test_psnr_by_hand():
    black, grey = torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.full((1, 2, 2, 3), 51, dtype=torch.uint8)
    assert float(metrics.psnr(grey, black)) == pytest.approx(-10 * math.log10(0.04))
    assert float(metrics.psnr(black, black)) == pytest.approx(50)
    assert metrics.psnr(torch.zeros(3, 4, 2, 2, 3), torch.zeros(3, 4, 2, 2, 3)).shape == (3, 4)


def test_ssim_is_one_for_the_same_and_falls_with_noise():
    x = ramp()
    scores = [float(metrics.ssim(noisy(x, s), x).mean()) for s in (0, 5, 40)]
    assert scores[0] == pytest.approx(1)
    assert scores[0] > scores[1] > scores[2]
    assert metrics.ssim(x[None], x[None]).shape == (1, 2)
    assert float(metrics.ssim(x[0], x[0])) == pytest.approx(1)


def test_code_use():
    assert metrics.perplexity(torch.tensor([0, 1, 2, 3]), 4) == pytest.approx(4)
    assert metrics.perplexity(torch.tensor([2, 2, 2]), 4) == pytest.approx(1)
    assert metrics.code_shares(torch.tensor([0, 0, 3]), 4).tolist() == pytest.approx([2 / 3, 0, 0, 1 / 3])


def test_mutual_information_and_nmi():
    a = torch.tensor([0, 0, 1, 1, 2, 2])
    assert metrics.nmi(a, (a + 1) % 3) == pytest.approx(1)
    assert metrics.mutual_information(a, a)[0] == pytest.approx(math.log(3))
    assert metrics.nmi(a, torch.zeros(6, dtype=torch.int64)) == 0
    assert metrics.nmi(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_against_its_closed_form():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=g, dtype=torch.float64)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(x, x + 2) == pytest.approx(24, rel=1e-6)
    # equal means, covariances C and 9C: trace(C) (1 + 9 - 6)
    centred = x - x.mean(0)
    assert metrics.frechet_distance(centred, 3 * centred) == pytest.approx(4 * float(torch.cov(x.T).trace()), rel=1e-6)


def test_bootstrap_covers_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 1
    mean, low, high = metrics.bootstrap(values)
    assert low < mean < high
    assert high - low == pytest.approx(4 * 1.96 / 2 / 20, rel=0.2)
    assert all(math.isnan(v) for v in metrics.bootstrap(torch.zeros(0)))
