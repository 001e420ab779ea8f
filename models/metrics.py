"""Measures of pictures, codes and distributions; frames are uint8, everything is computed in float64."""

import math
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_MSE = 1e-5  # of values in [0, 1]: identical frames count 50 dB, not infinity


def psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB per frame (...) of uint8 frames (..., H, W, C)."""
    error = (frames.double() - truth.double()).div(255).square().mean(dim=(-3, -2, -1))
    return -10 * error.clamp_min(_LEAST_MSE).log10()


def ssim(frames: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity per frame (...) of uint8 frames (..., H, W, C), 11x11 Gaussian (Wang et al. 2004)."""
    lead = frames.shape[:-3]
    x, y = (
        f.double().div(255).flatten(0, -4).permute(0, 3, 1, 2)
        if f.ndim > 3
        else f.double().div(255).permute(2, 0, 1)[None]
        for f in (frames, truth)
    )
    taps = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64, device=x.device) ** 2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    C = x.shape[1]

    def blur(z: Tensor) -> Tensor:
        z = F.conv2d(z, taps.view(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)
        return F.conv2d(z, taps.view(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    score = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return score.mean(dim=(1, 2, 3)).view(lead)


def code_shares(codes: Tensor, size: int) -> Tensor:
    """Share (size,) of each code among codes int64 (...)."""
    count = torch.bincount(codes.flatten(), minlength=size).double()
    return count / count.sum().clamp_min(1)


def perplexity(codes: Tensor, size: int) -> float:
    """Codes in effective use: exp of the entropy of their shares; 1 when collapsed, `size` when all are used alike."""
    share = code_shares(codes, size)
    return float(torch.exp(-(share * share.clamp_min(1e-300).log()).sum()))


def mutual_information(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Mutual information of two labelings int64 (n,), and their entropies, in nats."""
    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    table.index_put_((a.cpu(), b.cpu()), torch.ones(len(a), dtype=torch.float64), accumulate=True)
    table /= table.sum()

    def entropy(p: Tensor) -> float:
        return float(-(p * p.clamp_min(1e-300).log()).sum())

    ha, hb = entropy(table.sum(1)), entropy(table.sum(0))
    return max(0.0, ha + hb - entropy(table.flatten())), ha, hb


def nmi(a: Tensor, b: Tensor) -> float:
    """Normalised mutual information of two labelings int64 (n,): over the mean of their entropies, 0..1."""
    shared, ha, hb = mutual_information(a, b)
    return 2 * shared / (ha + hb) if ha + hb > 0 else 0.0


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to features (n, D) each (Heusel et al. 2017).

    The root of the product of covariances comes from an eigendecomposition of its symmetric form, in float64.
    """
    a, b = features_a.double(), features_b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def bootstrap(values: Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of values (n,) with the 2.5% and 97.5% quantiles of its bootstrap distribution."""
    values = values.double().flatten().cpu()
    if not len(values):
        return math.nan, math.nan, math.nan
    generator = torch.Generator().manual_seed(seed)
    means = values[torch.randint(len(values), (draws, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values.mean()), low, high


@lru_cache
def _random_filters() -> list[Tensor]:
    """Filters (out, in, 3, 3, 3) of three layers, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    widths = (3, 32, 64, 128)
    return [torch.randn(b, a, 3, 3, 3, generator=generator) * (2 / (27 * a)) ** 0.5 for a, b in pairwise(widths)]


def random_features(frames: Tensor) -> Tensor:
    """Features (B, 256) of clips uint8 (B, T, H, W, C) by a random 3D convolution net that never trains.

    Half of them see the frames, half the changes between them; both at 32 pixels a side. With `frechet_distance` they
    make "frd3d", which orders damage to video as FVD does and is no substitute for its numbers.
    """
    x = frames.flatten(0, 1).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    x = F.interpolate(x, (32, 32), mode="area").unflatten(0, frames.shape[:2]).transpose(1, 2)
    streams = []
    for y in (x, 4 * x.diff(dim=2)):
        for filters in _random_filters():
            y = F.conv3d(y, filters.to(y.device), stride=(1, 2, 2), padding=1).relu()
        streams.append(y.mean(dim=(2, 3, 4)))
    return torch.cat(streams, dim=1)
