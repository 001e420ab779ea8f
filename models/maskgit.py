"""MaskGIT (arXiv 2202.04200): how many tokens a pass reveals, which ones, and how they are drawn."""

from functools import lru_cache
from math import cos, pi

import torch
from torch import Tensor

from models.config import DynamicsConfig, SamplerConfig
from models.noise import uniform
from models.text import fold

_DRAW, _ORDER = 101, 102  # streams of random draws


@lru_cache
def reveal_counts(tokens: int, steps: int) -> tuple[int, ...]:
    """Tokens known after each pass: a cosine schedule (MaskGIT, 3.3), at least one more each time, at last all."""
    counts = [0]
    for step in range(1, steps + 1):
        due = tokens - int(tokens * cos(pi / 2 * step / steps))
        counts.append(tokens if step == steps else min(tokens, max(due, counts[-1] + 1)))
    return tuple(counts[1:])


@lru_cache
def halton_order(rows: int, columns: int) -> Tensor:
    """Rank (N,) of each place of a grid by a Halton sequence in bases 2 and 3: early places are spread evenly."""

    def radical_inverse(i: int, base: int) -> float:
        value, scale = 0.0, 1.0
        while i:
            scale /= base
            value += scale * (i % base)
            i //= base
        return value

    rank: dict[int, int] = {}
    i = 1
    while len(rank) < rows * columns:
        place = int(radical_inverse(i, 2) * rows) * columns + int(radical_inverse(i, 3) * columns)
        rank.setdefault(place, len(rank))
        i += 1
    return torch.tensor([rank[place] for place in range(rows * columns)])


def draw(logits_RK: Tensor, noise_R: Tensor, temperature: float, top_k: int = 0) -> tuple[Tensor, Tensor]:
    """Draw tokens by inverse distribution function -> tokens (R,) and the logarithm of their probability.

    Leading dimensions may be any number, not only one.
    """
    logits = logits_RK.float()
    if temperature == 0:
        best, token = logits.log_softmax(-1).max(-1)
        return token, best
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
    probability = logits.softmax(-1)
    cumulated = probability.cumsum(-1)
    token = torch.searchsorted(cumulated, noise_R[..., None] * cumulated[..., -1:]).clamp_max(logits.shape[-1] - 1)
    chance = probability.gather(-1, token)
    return token[..., 0], chance[..., 0].clamp_min(1e-30).log()


def noise_keys(seed: int, frame: int, passed: int) -> tuple[int, int]:
    """What noise depends on: the session's seed and the frame's index; and with them the pass."""
    seed &= 2**63 - 1
    key = fold(seed, frame)
    return key, fold(passed, state=key)


class Revealer:
    """Draws tokens and says which are kept, on one device; a function of logits, place and keys, not of neighbours."""

    def __init__(self, cfg: DynamicsConfig, sampler: SamplerConfig, device: torch.device) -> None:
        self.sampler, self.mask_token = sampler, cfg.vocabulary
        self._streams = torch.tensor([[_DRAW], [_ORDER]], device=device)
        self._halton = halton_order(cfg.rows, cfg.columns).to(device)

    def drawn(
        self, logits_RK: Tensor, place_R: Tensor, frame_R: Tensor, key_R: Tensor, passed_R: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A token for each place and how early it is to be kept, both (R,); the keys are `noise_keys`'."""
        cfg = self.sampler
        noise, other = uniform(self._streams, place_R, state=key_R)
        token, score = draw(logits_RK, noise, cfg.temperature, cfg.top_k)
        if cfg.order == "halton":
            return token, -self._halton[place_R].to(score.dtype)
        if cfg.order == "random":
            return token, uniform(_ORDER, place_R, state=frame_R)
        fade = cfg.order_noise * (1 - (passed_R + 1) / cfg.steps)
        return token, score - fade * torch.log(-torch.log(other))

    def reveal(self, logits_SNK: Tensor, current_SN: Tensor, facts_SF: Tensor) -> Tensor:
        """The frames (S, N) after a pass; facts begin with keys of frame and pass, passes done, tokens to be known."""
        tokens = current_SN.shape[1]
        place = torch.arange(current_SN.numel(), device=current_SN.device) % tokens
        frame, key, passed = facts_SF[:, :3].repeat_interleave(tokens, dim=0).unbind(1)
        token, score = self.drawn(logits_SNK.flatten(0, 1), place, frame, key, passed)
        known = current_SN != self.mask_token
        token = torch.where(known, current_SN, token.view_as(current_SN))
        return self.kept(token, score.view_as(current_SN).masked_fill(known, torch.inf), facts_SF[:, 3])

    def kept(self, token_SN: Tensor, score_SN: Tensor, count_S: Tensor) -> Tensor:
        """The `count` tokens of each frame with the highest scores, the mask token elsewhere: (S, N)."""
        rank = score_SN.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return torch.where(rank < count_S[:, None], token_SN, self.mask_token)
