"""Discrete bottlenecks: a codebook that follows its encodings, one that learns by gradient, on the sphere, or FSQ.

Statistics gather in `forward` while training and are applied once per optimizer step in `end_step`, over all
processes, so that every rank holds the same codes. Dead codes are revived from live encodings.
"""

from dataclasses import replace
from math import ceil, pi
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.config import CodebookConfig
from models.noise import mix, uniform, uniform_for

_POOL_LEAST, _POOL_MOST, _LLOYD_ROUNDS = 256, 4096, 10
_STARTS, _FEW_CODES = 8, 64
_KEPT = 0.9  # a code is not moved in the steps after a revival until its use was seen: see `_revive`


class Quantized(NamedTuple):
    """What leaves the bottleneck: codes int64 (...), vectors (..., dim) with straight-through gradient, loss ()."""

    codes: Tensor
    vectors: Tensor
    loss: Tensor


def _all_sum(x: Tensor, group: Any) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, group=group)
    return x


def _all_rows(x: Tensor, group: Any) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)
    return x


def kmeans(points_MD: Tensor, codes: int) -> Tensor:
    """Deterministic k-means -> centres (codes, D); small codebooks take the best of several starts."""
    found = [_lloyd(points_MD, codes, seed) for seed in range(_STARTS if codes <= _FEW_CODES else 1)]
    return min(found, key=lambda centres: float(torch.cdist(points_MD, centres).min(-1).values.square().sum()))


def _lloyd(points_MD: Tensor, codes: int, seed: int) -> Tensor:
    """Lloyd's rounds from k-means++ seeds."""
    place = torch.arange(len(points_MD), device=points_MD.device)
    chosen = [points_MD[seed % len(points_MD)]]
    nearest = torch.full_like(points_MD[:, 0], torch.inf)
    for i in range(1, codes):
        nearest = torch.minimum(nearest, (points_MD - chosen[-1]).square().sum(-1))
        gumbel = -torch.log(-torch.log(uniform(seed, i, place)))
        chosen.append(points_MD[(nearest.clamp_min(1e-12).log() + gumbel).argmax()])
    centres = torch.stack(chosen)
    for _ in range(_LLOYD_ROUNDS):
        member = F.one_hot(torch.cdist(points_MD, centres).argmin(-1), codes).to(points_MD.dtype)
        count = member.sum(0)[:, None]
        centres = torch.where(count > 0, member.T @ points_MD / count.clamp_min(1), centres)
    return centres


def usage(codes: Tensor, size: int) -> dict[str, Tensor]:
    """Share of `size` codes used, and the perplexity of codes int64 (...), as scalars."""
    share = torch.bincount(codes.flatten(), minlength=size).float()
    share = share / share.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return {"codes_used": (share > 0).float().mean(), "perplexity": entropy.exp()}


class Codebook(nn.Module):
    """K codes of `dim` features; see CodebookConfig for the kinds.

    Attributes:
        group: the process group whose ranks hold different samples; None for all ranks.
    """

    group: Any = None
    codes: Tensor
    usage: Tensor
    sums: Tensor
    seen_count: Tensor
    seen_sum: Tensor
    pool: Tensor
    pool_rank: Tensor

    def __init__(self, cfg: CodebookConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.continuous = False
        self._starting = False
        pool = min(max(4 * cfg.size, _POOL_LEAST), _POOL_MOST)
        codes = torch.randn(cfg.size, cfg.dim, generator=torch.Generator().manual_seed(0))
        if cfg.kind == "cosine":
            codes = F.normalize(codes, dim=-1)
        if cfg.kind == "vq":
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes, persistent=cfg.kind != "fsq")
        self.register_buffer("usage", torch.ones(cfg.size))  # moving average of uses per step
        self.register_buffer("sums", codes.clone() if cfg.kind in ("ema", "cosine") else torch.zeros(0))
        for name, value in {
            "seen_count": torch.zeros(cfg.size),
            "seen_sum": torch.zeros(cfg.size, cfg.dim),
            "pool": torch.zeros(pool, cfg.dim),
            "pool_rank": torch.full((pool,), -1.0),
        }.items():
            self.register_buffer(name, value, persistent=False)  # empty between steps, so not part of a checkpoint

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> "Codebook":
        """Move as usual, but never lower the codes' precision: sums of many steps do not fit bf16."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in self.named_buffers():
            if value.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = before[name].to(device=value.device)
        return self

    def begin_step(self, step: int, total_steps: int) -> None:
        """Say where training stands: the first steps pass encodings on as they are, then codes start from them."""
        warm = max(1, ceil(self.cfg.warmup_share * total_steps))
        self.continuous, self._starting = step < warm, step == warm - 1

    @override
    def forward(self, z: Tensor, key_B: Tensor | None = None) -> Quantized:
        """Encodings (B, ..., dim), sample keys (B,) -> Quantized. While training, also gathers statistics."""
        if self.cfg.kind == "fsq":
            return self._round(z)
        dtype, z = z.dtype, z.to(self.codes.dtype)
        codes = self.nearest(z)
        if self.cfg.kind == "cosine":
            z = F.normalize(z, dim=-1)
        if self.training:
            self._observe(z.detach(), codes, key_B)
        if self.training and self.continuous:
            vectors, loss = self._channel(z, key_B)
            return Quantized(codes, vectors.to(dtype), loss + 0.0 * self.codes.sum())
        vectors = self.codes[codes]
        loss = self.cfg.commitment * F.mse_loss(z, vectors.detach())
        if self.cfg.kind == "vq":
            loss = loss + F.mse_loss(vectors, z.detach())
        return Quantized(codes, (z + (vectors - z).detach()).to(dtype), loss)

    def _channel(self, z: Tensor, key_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encodings through a noisy channel and the price of their energy (a variational bottleneck, arXiv 1612.00410).

        Without it the continuous code carries whatever it can, and k-means then splits along the wrong directions.
        """
        if self.cfg.channel == 0 or self.cfg.warmup_share == 0:
            return z, 0.0 * z.sum()
        key_B = torch.zeros(len(z), dtype=torch.int64, device=z.device) if key_B is None else key_B
        first, second = (uniform_for(key_B, stream, *z.shape[1:]) for stream in (11, 12))
        normal = (-2 * first.log()).sqrt() * (2 * pi * second).cos()
        return z + normal.to(z.dtype), self.cfg.channel / 2 * z.square().sum(-1).mean()

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Codes int64 (...) of encodings (..., dim), gathering no statistics."""
        if self.cfg.kind == "fsq":
            return self._digits(self._bounded(z).round())
        if self.cfg.kind == "cosine":
            z = F.normalize(z, dim=-1)
        codes = self.codes.to(z.dtype)
        flat = z.reshape(-1, self.cfg.dim)
        return (flat @ codes.T - 0.5 * codes.square().sum(-1)).argmax(-1).view(z.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """Vectors (..., dim) of codes int64 (...)."""
        if self.cfg.kind != "fsq":
            return self.codes[codes]
        digits: list[Tensor] = []
        basis = 1
        for levels in self.cfg.levels:
            digits.append((codes // basis % levels - levels // 2) / (levels // 2))
            basis *= levels
        return torch.stack(digits, dim=-1)

    def _bounded(self, z: Tensor) -> Tensor:
        """Features squeezed so that they round to their levels."""
        levels = torch.tensor(self.cfg.levels, device=z.device, dtype=z.dtype)
        half, offset = (levels - 1) * 1.001 / 2, (levels % 2 == 0).to(z.dtype) / 2
        return (z + (offset / half).atanh()).tanh() * half - offset

    def _digits(self, rounded: Tensor) -> Tensor:
        """Rounded features (..., dim) -> codes int64 (...): the features are the digits."""
        levels = torch.tensor(self.cfg.levels, device=rounded.device)
        basis = torch.cat((levels.new_ones(1), levels[:-1].cumprod(0)))
        return ((rounded.long() + levels // 2) * basis).sum(-1)

    def _round(self, z: Tensor) -> Quantized:
        """Finite scalar quantization: bound each feature, round it with straight-through gradient."""
        bounded = self._bounded(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        codes = self._digits(rounded.detach().round())
        if self.training:
            self._count(codes)
        half = torch.tensor(self.cfg.levels, device=z.device) // 2
        return Quantized(codes, (bounded if self.training and self.continuous else rounded) / half, 0.0 * z.sum())

    @torch.no_grad()
    def _count(self, codes: Tensor) -> None:
        self.seen_count += torch.bincount(codes.flatten(), minlength=self.cfg.size).to(self.seen_count.dtype)

    @torch.no_grad()
    def _observe(self, z: Tensor, codes: Tensor, key_B: Tensor | None) -> None:
        """Add to the step's sums, and keep a random pool of encodings, chosen by hash of (sample key, place)."""
        flat = z.reshape(-1, self.cfg.dim)
        self._count(codes)
        self.seen_sum.index_add_(0, codes.flatten(), flat)
        key_B = torch.zeros(len(z), dtype=torch.int64, device=z.device) if key_B is None else key_B
        place = torch.arange(len(flat) // len(z), device=z.device)
        rank = (mix(key_B[:, None], 7, place).flatten() & 0xFFFFFF).to(self.pool_rank.dtype)
        self._keep(torch.cat((self.pool, flat)), torch.cat((self.pool_rank, rank)))

    def _keep(self, points: Tensor, rank: Tensor) -> None:
        """Make the points of highest rank the pool."""
        self.pool_rank, best = rank.topk(len(self.pool_rank))
        self.pool = points[best]

    @torch.no_grad()
    def end_step(self) -> None:
        """Apply what the step's forwards saw: moving averages, the start of the codes, revival of dead ones."""
        cfg = self.cfg
        _all_sum(self.seen_count, self.group)
        if cfg.kind != "fsq":
            _all_sum(self.seen_sum, self.group)
            rows, ranks = _all_rows(self.pool, self.group), _all_rows(self.pool_rank, self.group)
            self.pool_rank, best = ranks.topk(len(self.pool_rank))  # of all ranks' rows, each once: alike everywhere
            self.pool = rows[best]
            live = self.pool[self.pool_rank >= 0]
            if self._starting and len(live):
                self._start(live)
            elif not self.continuous:
                self._follow()
                self._revive(live)
        else:
            self.usage.lerp_(self.seen_count, 1 - cfg.decay)
        self.forget()

    def forget(self) -> None:
        """Drop what forwards have seen since the last step; for a step that is left out."""
        for total in (self.seen_count, self.seen_sum, self.pool):
            total.zero_()
        self.pool_rank.fill_(-1.0)

    def _start(self, live: Tensor) -> None:
        """Codes at the centres of the live encodings."""
        repeats = -(-self.cfg.size // len(live))
        self.codes.copy_(kmeans(live.repeat(repeats, 1), self.cfg.size))
        if self.cfg.kind == "cosine":
            self.codes.copy_(F.normalize(self.codes, dim=-1))
        count = torch.bincount(self.nearest(live), minlength=self.cfg.size).to(self.usage.dtype)
        self.usage.copy_(count * (self.seen_count.sum() / count.sum()))
        self._restart_sums()

    def _restart_sums(self) -> None:
        if self.cfg.kind in ("ema", "cosine"):
            self.sums.copy_(self.codes * self.usage[:, None])

    def _follow(self) -> None:
        """Move the averages (VQ-VAE-2, arXiv 1906.00446, with Laplace-smoothed counts)."""
        self.usage.lerp_(self.seen_count, 1 - self.cfg.decay)
        if self.cfg.kind in ("ema", "cosine"):
            self.sums.lerp_(self.seen_sum, 1 - self.cfg.decay)
            total = self.usage.sum()
            smooth = (self.usage + 1e-5) / (total + self.cfg.size * 1e-5) * total
            codes = self.sums / smooth[:, None].clamp_min(1e-8)
            self.codes.copy_(F.normalize(codes, dim=-1) if self.cfg.kind == "cosine" else codes)

    def _revive(self, live: Tensor) -> None:
        """Move codes that are hardly used onto live encodings, with the mean use so that they get time to live."""
        mean = self.usage.mean()
        dead = (self.usage < self.cfg.revive_below * mean).nonzero().flatten()[: len(live)]
        if len(dead):
            self.codes.data[dead] = live[: len(dead)]
            self.usage[dead] = _KEPT * mean
            if self.cfg.kind in ("ema", "cosine"):
                self.sums[dead] = self.codes[dead] * self.usage[dead][:, None]

    def metrics(self, codes: Tensor) -> dict[str, Tensor]:
        """Share of codes used and perplexity of these codes int64 (...), as scalars."""
        return usage(codes, self.cfg.size)


class TwoLevels(nn.Module):
    """Coarse groups of codes, then a fine code for what is left over; code = group * fine codes + fine code."""

    def __init__(self, cfg: CodebookConfig, groups: int) -> None:
        super().__init__()
        self.cfg, self.fine_codes = cfg, cfg.size // groups
        self.coarse = Codebook(replace(cfg, size=groups))
        self.fine = Codebook(replace(cfg, size=self.fine_codes))

    @property
    def continuous(self) -> bool:
        """Whether encodings still pass unquantized."""
        return self.fine.continuous

    def begin_step(self, step: int, total_steps: int) -> None:
        """As Codebook's; the fine codes start one step later, from what the coarse ones leave over."""
        self.coarse.begin_step(step, total_steps)
        self.fine.begin_step(step - 1, total_steps)

    def end_step(self) -> None:
        """As Codebook's."""
        self.coarse.end_step()
        self.fine.end_step()

    @override
    def forward(self, z: Tensor, key_B: Tensor | None = None) -> Quantized:
        """As Codebook's."""
        first = self.coarse(z, key_B)
        left = z - self.coarse.lookup(first.codes).detach()
        second = self.fine(left, key_B)
        vectors = z + (self.lookup(self._join(first.codes, second.codes)) - z).detach()
        if self.training and self.continuous:
            vectors = first.vectors if self.coarse.continuous else z
        return Quantized(self._join(first.codes, second.codes), vectors, first.loss + second.loss)

    def _join(self, coarse: Tensor, fine: Tensor) -> Tensor:
        return coarse * self.fine_codes + fine

    def nearest(self, z: Tensor) -> Tensor:
        """As Codebook's."""
        coarse = self.coarse.nearest(z)
        return self._join(coarse, self.fine.nearest(z - self.coarse.lookup(coarse)))

    def lookup(self, codes: Tensor) -> Tensor:
        """As Codebook's."""
        return self.coarse.lookup(codes // self.fine_codes) + self.fine.lookup(codes % self.fine_codes)

    def metrics(self, codes: Tensor) -> dict[str, Tensor]:
        """As Codebook's, over all codes."""
        return usage(codes, self.cfg.size)
