"""The space-time transformer: blocks of spatial attention, causal temporal attention and one feed-forward."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from models.attention import Cache, Clock, FullAttention, SpatialAttention, TemporalAttention, rotation
from models.config import TransformerConfig


def causal_mask(frames: int, window: int, device: torch.device) -> Tensor:
    """Which frames each frame sees, bool (T, T): itself and the window-1 before it."""
    age = torch.arange(frames, device=device)[:, None] - torch.arange(frames, device=device)
    return (age >= 0) & (age < window)


class FeedForward(nn.Module):
    """Norm, expand, GELU, contract; FiLM scales and shifts the normed features where a condition is given."""

    def __init__(self, cfg: TransformerConfig, film: bool) -> None:
        super().__init__()
        hidden = int(cfg.width * cfg.ff_ratio)
        self.norm = nn.LayerNorm(cfg.width)  # its bias, through `up`, is the hidden layer's, and costs nothing
        self.up = nn.Linear(cfg.width, hidden, bias=False)
        self.down = nn.Linear(hidden, cfg.width, bias=False)
        self.film = nn.Linear(cfg.width, 2 * cfg.width) if film else None

    @override
    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x (..., N, D), condition (..., D) -> the change to add (..., N, D)."""
        return self.down(F.gelu(self._hidden(x, condition)))

    def step(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The same where nothing is learned: in place, as large batches of sessions wait for new memory."""
        return self.down(torch.ops.aten.gelu_(self._hidden(x, condition)))

    def _hidden(self, x: Tensor, condition: Tensor | None) -> Tensor:
        y = self.norm(x)
        if self.film is not None and condition is not None:
            scale, shift = self.film(condition)[..., None, :].chunk(2, dim=-1)
            y = y * (1 + scale) + shift
        return self.up(y)


class Block(nn.Module):
    """One block; it may lack spatial or temporal attention."""

    def __init__(self, cfg: TransformerConfig, spatial: bool, temporal: bool, film: bool) -> None:
        super().__init__()
        full = cfg.attention == "full"
        self.spatial = SpatialAttention(cfg) if spatial else None
        self.temporal = (FullAttention if full else TemporalAttention)(cfg) if temporal else None
        self.feed = FeedForward(cfg, film)

    @override
    def forward(self, x_BTND: Tensor, condition: Tensor | None, clock: tuple[Tensor, Tensor | None]) -> Tensor:
        """A whole window (B, T, N, D); `clock` is (turns, mask)."""
        x = x_BTND
        if self.spatial is not None:
            x = _added(x, self.spatial(x))
        if self.temporal is not None:
            x = _added(x, self.temporal(x, *clock))
        return _added(x, self.feed(x, condition))

    def cache(self, slots: int, tokens: int, cells: int) -> Cache | None:
        """An empty cache of the temporal attention, if there is one."""
        return self.temporal.cache(slots, tokens, cells) if self.temporal is not None else None

    def step(self, x_SND: Tensor, condition: Tensor | None, cache: Cache | None, clock: Clock, feed: bool) -> Tensor:
        """One frame per slot (S, N, D), with or without the feed-forward; writes to the cache."""
        x = x_SND
        if self.spatial is not None:
            x = _added(x, self.spatial(x))
        if self.temporal is not None and cache is not None:
            x = _added(x, self.temporal.step(x, cache, clock))
        return _added(x, self.feed.step(x, condition)) if feed else x


class Transformer(nn.Module):
    """Blocks and a final norm. Positions in space are added by whoever embeds; time is rotary, in here."""

    def __init__(self, cfg: TransformerConfig, film: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        count = -(-cfg.layers // 2) if cfg.attention == "st" else cfg.layers
        self.blocks = nn.ModuleList(
            Block(
                cfg,
                cfg.attention in ("st", "space"),
                cfg.attention == "full" or (cfg.attention == "st" and 2 * i + 1 < cfg.layers),
                film,
            )
            for i in range(count)
        )
        self.norm = nn.LayerNorm(cfg.width, bias=False)
        self.apply(_initialise)
        for block in self.blocks:
            for name, weight in block.named_parameters():
                if name.endswith(("out.weight", "down.weight")):
                    nn.init.trunc_normal_(weight, std=cfg.width**-0.5 / (2 * cfg.layers) ** 0.5)

    @override
    def forward(self, x_BTND: Tensor, condition_BTD: Tensor | None = None, two_streams: bool = False) -> Tensor:
        """A whole window (B, T, N, D) -> features (B, T, N, D); frame t depends on frames <= t only.

        With `two_streams`, the second half of T holds other versions of the frames of the first half: each sees the
        first half's frames before it, and itself (complete teacher forcing).
        """
        cfg, T = self.cfg, x_BTND.shape[1] // (2 if two_streams else 1)
        time, mask = torch.arange(T, device=x_BTND.device), causal_mask(T, cfg.window, x_BTND.device)
        if two_streams:
            itself = torch.eye(T, dtype=torch.bool, device=mask.device)
            above = torch.cat((mask, torch.zeros_like(mask)), dim=1)
            time, mask = torch.cat((time, time)), torch.cat((above, torch.cat((mask & ~itself, itself), dim=1)))
        elif cfg.window >= T:
            mask = None  # plain causal attention, which has a faster kernel
        clock = (rotation(time, cfg.head_size, x_BTND.dtype), mask)
        x = x_BTND
        for block in self._blocks():
            if cfg.checkpointing and self.training:
                x = checkpoint(block, x, condition_BTD, clock, use_reentrant=False)
            else:
                x = block(x, condition_BTD, clock)
        return self.norm(x)

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def caches(self, slots: int, tokens: int, cells: int) -> list[Cache | None]:
        """Empty caches for `slots` streams of `tokens` per frame, `cells` frames deep; None where none is needed."""
        return [b.cache(slots, tokens, cells) for b in self._blocks()]

    def step(self, x_SND: Tensor, condition_SD: Tensor | None, caches: list[Cache | None], clock: Clock) -> Tensor:
        """One new frame per slot (S, N, D) -> its features (S, N, D), given the cached frames.

        They still lack what `finish` does, which each place needs for itself alone, if it needs it.
        """
        x, last = x_SND, len(self.blocks) - 1
        for i, (block, cache) in enumerate(zip(self._blocks(), caches, strict=True)):
            x = block.step(x, condition_SD, cache, clock, feed=i < last)
        return x

    def finish(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """The last feed-forward and norm of `step`'s features, of any places (..., R, D); condition (..., D)."""
        return self.norm(_added(x, self._blocks()[-1].feed.step(x, condition)))


def _added(x: Tensor, change: Tensor) -> Tensor:
    """Their sum, in the change's memory where that is alike: new memory costs a CPU more than the sum."""
    alike = change.dtype == x.dtype and change.is_contiguous()
    return change.add_(x) if alike else x + change


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Places(nn.Module):
    """Learned positions of a grid of tokens, one per row plus one per column."""

    def __init__(self, rows: int, columns: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(rows, 1, width))
        self.columns = nn.Parameter(torch.empty(1, columns, width))
        nn.init.trunc_normal_(self.rows, std=0.02)
        nn.init.trunc_normal_(self.columns, std=0.02)

    @override
    def forward(self) -> Tensor:
        """Positions (N, D), in reading order."""
        return (self.rows + self.columns).flatten(0, 1)
