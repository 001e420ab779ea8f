"""Attention in space and causal attention in time, over whole windows and frame by frame with a cache.

Every module offers `forward(x_BTND)` for windows and, where it looks at other frames, `step(x_SND, cache, clock)` for
one new frame per slot. Both compute the same function; tests hold them equal in double precision.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.config import TransformerConfig

_NEAR = 2**16  # numbers that stay in a core's nearest caches
_BASE = 100.0  # of the rotation frequencies: windows are tens of frames, not thousands of words


def rotation(positions: Tensor, head_size: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines (*positions.shape, head_size/2, 2) of rotary positions (arXiv 2104.09864), in float64 first."""
    powers = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float64) / head_size
    angles = positions.double()[..., None] * _BASE**-powers
    return torch.stack((angles.cos(), angles.sin()), dim=-1).to(torch.promote_types(dtype, torch.float32))


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring pairs of features; complex products cost a quarter of the textbook form on a CPU.

    Compilers fuse the textbook form and do not know complex numbers.
    """
    pairs = x.to(turns.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling() or turns.is_cuda:
        (a, b), (c, s) = pairs.unbind(-1), turns.unbind(-1)
        return torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2).to(x.dtype)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(turns)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


@dataclass
class Clock:
    """Where each slot's new frame stands in time; made once per pass and shared by all layers.

    Attributes:
        rows: the slots in the pass: a slice (no copy) or int64 indices (S,).
        index: the same as int64 indices (S,).
        cell: cache cell that the new frame is written to, int64 (S,).
        turns: rotations of the new frame (S, head_size/2, 2).
        hidden: 0 for cells that the new frame sees, minus infinity for others (S, cells).
        used: no slot sees a cell from this one on.
        same: the cell that all slots write to, if it is one and the host knows it.
    """

    rows: slice | Tensor
    index: Tensor
    cell: Tensor
    turns: Tensor
    hidden: Tensor
    used: int
    same: int | None = None

    @classmethod
    def at(
        cls,
        rows: slice | Tensor,
        position_S: Tensor,
        first_S: Tensor,
        cells: int,
        window: int,
        head_size: int,
        dtype: torch.dtype,
        used: int | None = None,
        same: int | None = None,
    ) -> "Clock":
        """For new frames at `position_S` of streams whose cached frames begin at `first_S`, in a ring of `cells`."""
        device = position_S.device
        index = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        age = torch.remainder(position_S[:, None] - torch.arange(cells, device=device), cells)
        seen = (age < window) & (position_S[:, None] - age >= first_S[:, None])
        hidden = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
        turns = rotation(position_S, head_size, dtype)
        return cls(
            rows, index, torch.remainder(position_S, cells), turns, hidden, cells if used is None else used, same
        )


class Cache:
    """Keys and values of past frames of one layer, for all slots: each (cells, slots, N, kv_heads, head_size).

    Cells are outermost so that a frame is written in one piece: scattered writes cost as much as both products.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    @property
    def slot_bytes(self) -> int:
        """Memory of one slot."""
        return 2 * self.keys[:, 0].numel() * self.keys.element_size()

    def copy(self, source: int, slot: int) -> None:
        """Overwrite a slot with another."""
        for part in (self.keys, self.values):
            part[:, slot].copy_(part[:, source])


class Heads(nn.Module):
    """Fused projections to queries, keys and values, with QK norm; and back."""

    def __init__(self, cfg: TransformerConfig, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = cfg.heads, kv_heads, cfg.head_size
        self.norm = nn.LayerNorm(cfg.width, bias=False)
        self.qkv = nn.Linear(cfg.width, (cfg.heads + 2 * kv_heads) * cfg.head_size, bias=False)
        self.out = nn.Linear(cfg.heads * cfg.head_size, cfg.width, bias=False)
        self.gain = nn.Parameter(torch.ones(cfg.head_size)) if cfg.qk_norm else None

    def split(self, x: Tensor, turns: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., D) -> q (..., heads, size), k and v (..., kv_heads, size); q, k normalised and turned in time."""
        # three products: each comes out in one piece, as the norm wants it, and gradients are not joined by a copy
        kv = self.kv_heads * self.size
        weights = self.qkv.weight.split((self.heads * self.size, kv, kv))
        y = self.norm(x)
        q, k, v = (F.linear(y, weight).unflatten(-1, (-1, self.size)) for weight in weights)
        if self.gain is not None:
            q, k = (F.layer_norm(t, (self.size,), self.gain) for t in (q, k))
        if turns is not None:
            q, k = _rotate(q, turns), _rotate(k, turns)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        """SDPA over (batch, heads, length, size), with grouped K/V heads repeated."""
        if self.kv_heads != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class SpatialAttention(Heads):
    """Tokens of one frame see each other."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(cfg, cfg.heads)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """x (..., N, D) -> the change to add (..., N, D)."""
        q, k, v = (t.flatten(0, -4).transpose(1, 2) for t in self.split(x))
        y = self.attend(q, k, v, None).transpose(1, 2)
        return self.out(y.reshape(*x.shape[:-1], self.heads * self.size))


class TemporalAttention(Heads):
    """Each token sees the same place in this frame and the window-1 frames before it."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__(cfg, cfg.kv_heads or cfg.heads)
        self.window = cfg.window

    @override
    def forward(self, x_BTND: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
        """Whole window; turns (T, size/2, 2); mask (T, T) says which frames each sees, None for all before and itself.

        Time is moved next to the features before projecting: one small copy instead of three large ones.
        """
        B, T, N, _ = x_BTND.shape
        q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in self.split(x_BTND.transpose(1, 2), turns[:, None]))
        if x_BTND.is_cuda or self.kv_heads != self.heads:
            y = self.attend(q, k, v, mask, causal=mask is None)
        else:  # of so few frames the scores are small, and plain products a tenth faster than SDPA on a CPU
            seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril() if mask is None else mask
            hidden = torch.zeros(T, T, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
            y = ((q * self.size**-0.5) @ k.transpose(-1, -2) + hidden).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(B, N, T, -1)).transpose(1, 2)

    def cache(self, slots: int, tokens: int, cells: int) -> Cache:
        """An empty cache on the module's device."""
        shape = (cells, slots, tokens, self.kv_heads, self.size)
        return Cache(self.qkv.weight.new_zeros(shape), self.qkv.weight.new_zeros(shape))

    def step(self, x_SND: Tensor, cache: Cache, clock: Clock) -> Tensor:
        """One frame per slot: writes its keys and values to the cache, returns the change to add (S, N, D).

        Plain products instead of SDPA: with one query per token there is nothing to fuse, and grouped heads share keys
        without copying them.
        """
        S, N, _ = x_SND.shape
        q, keys, values = self.remember(x_SND, cache, clock)
        keys, values = (t.flatten(1, 3) for t in (keys, values))  # (cells, S*N*kv_heads, size)
        hidden = clock.hidden[:, None].expand(-1, N * self.kv_heads, -1).flatten(0, 1)
        q = q.reshape(len(hidden), -1, self.size) * self.size**-0.5
        small = q[0].numel() * len(keys) < 400 and q.shape[1] == 1  # 400 is torch's own bound, in bmm
        if small and not x_SND.is_cuda:
            used = clock.used  # cells that nobody sees add zeros at the end of sums: the same bits without them
            return self.out(_cell_by_cell(q[:, 0], keys[:used], values[:used], hidden.T[:used]).view(S, N, -1))
        scores = torch.baddbmm(hidden[:, None], q, keys.permute(1, 2, 0))
        return self.out((scores.softmax(-1) @ values.transpose(0, 1)).reshape(S, N, -1))

    def remember(self, x_SND: Tensor, cache: Cache, clock: Clock) -> tuple[Tensor, Tensor, Tensor]:
        """Write the new frames' keys and values -> q (S, N, heads, size), all keys and values of these slots."""
        q, k, v = self.split(x_SND, clock.turns[:, None, None])
        for part, new in ((cache.keys, k), (cache.values, v)):
            if clock.same is None:
                part[clock.cell, clock.index] = new
            else:  # in one piece, which is less work than by index
                part[clock.same, clock.rows] = new
        return q, cache.keys[:, clock.rows], cache.values[:, clock.rows]


def _cell_by_cell(q_Bd: Tensor, keys_CBd: Tensor, values_CBd: Tensor, hidden_CB: Tensor) -> Tensor:
    """Attention (B, size) to few small cells: torch's products and softmax of so few leave vector units idle."""
    ones, scores = q_Bd.new_ones(q_Bd.shape[1]), q_Bd.new_empty(hidden_CB.shape)
    cells = 1 if keys_CBd.numel() > _NEAR else len(keys_CBd)
    for keys, score in zip(keys_CBd.split(cells), scores.split(cells), strict=True):
        torch.mv((keys * q_Bd).flatten(0, 1), ones, out=score.view(-1))
    share = scores.add_(hidden_CB).softmax(0)[..., None]
    total = share[0] * values_CBd[0]
    for cell in range(1, len(share)):
        total.addcmul_(share[cell], values_CBd[cell])
    return total


class FullAttention(TemporalAttention):
    """Every token sees all tokens of this frame and of the window-1 frames before it (C-ViViT, arXiv 2210.02399)."""

    @override
    def forward(self, x_BTND: Tensor, turns: Tensor, mask: Tensor | None) -> Tensor:
        """Whole window, as TemporalAttention, over T*N tokens at once."""
        B, T, N, _ = x_BTND.shape
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in self.split(x_BTND, turns[:, None, None]))
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=x_BTND.device).tril()
        y = self.attend(q, k, v, mask.repeat_interleave(N, 0).repeat_interleave(N, 1)).transpose(1, 2)
        return self.out(y.reshape(B, T, N, -1))

    @override
    def step(self, x_SND: Tensor, cache: Cache, clock: Clock) -> Tensor:
        """One frame per slot, as TemporalAttention."""
        S, N, _ = x_SND.shape
        q, keys, values = self.remember(x_SND, cache, clock)
        keys, values = (t.permute(1, 3, 0, 2, 4).flatten(2, 3) for t in (keys, values))  # (S, heads, cells*N, size)
        mask = clock.hidden[:, None, None].repeat_interleave(N, dim=-1)
        y = self.attend(q.transpose(1, 2), keys, values, mask).transpose(1, 2)
        return self.out(y.reshape(S, N, -1))
