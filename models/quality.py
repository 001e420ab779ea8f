"""The quality classifier: a ResNet-18 (arXiv 1512.03385) on thumbnails of a clip, averaged over its frames.

The paper (section 3.1) sorts its videos with an 11M-parameter ResNet-18 trained on 10,000 hand-labelled ones. Here
groups take the place of batch statistics (arXiv 1803.08494), so that a score never depends on the clip's neighbours,
nor training on the number of workers.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import override

from models.config import QualityConfig


class Block(nn.Module):
    """Two 3x3 convolutions beside a short cut."""

    def __init__(self, inside: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in range(2))
        plain = stride == 1 and inside == width
        self.short = nn.Identity() if plain else nn.Conv2d(inside, width, 1, stride, bias=False)
        nn.init.zeros_(self.norms[1].weight)  # pyrefly: ignore

    @override
    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,width,H/stride,W/stride)"""
        y = F.relu(self.norms[0](self.first(x_BCHW)))
        return F.relu(self.short(x_BCHW) + self.norms[1](self.second(y)))


class QualityNet(nn.Module):
    """Thumbnails of a clip -> the logit of its being good gameplay."""

    def __init__(self, cfg: QualityConfig) -> None:
        super().__init__()
        self.cfg = cfg
        widths = [cfg.width * 2**stage for stage in range(4)]
        inside = [widths[0], *widths[:-1]]
        self.stem = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.norm = nn.GroupNorm(cfg.groups, widths[0])
        blocks: list[nn.Module] = []
        for stage, (before, width) in enumerate(zip(inside, widths, strict=True)):
            blocks += [Block(before, width, 2 if stage else 1, cfg.groups), Block(width, width, 1, cfg.groups)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], 1)

    def begin_step(self, step: int, total_steps: int) -> None:
        """Nothing here depends on where training stands."""

    def end_step(self) -> None:
        """Nothing to do after the optimizer's step."""

    def logits(self, frames_BTHWC: Tensor) -> Tensor:
        """Thumbnails uint8 (B,T,H,W,3) -> (B,)."""
        x = rearrange(frames_BTHWC, "b t h w c -> (b t) c h w").to(self.head.weight.dtype) / 127.5 - 1
        x = self.blocks(F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1))
        features = x.mean((2, 3)).unflatten(0, frames_BTHWC.shape[:2])
        return self.head(features.mean(1))[:, 0]

    @torch.no_grad()
    def score(self, frames_BTHWC: Tensor) -> Tensor:
        """Probability of good gameplay, (B,)."""
        return self.logits(frames_BTHWC).float().sigmoid()

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted cross-entropy of batch["frames"] (B,T,H,W,3), batch["label"] (B,), batch["weight"] (B,)."""
        label, weight = batch["label"].float(), batch["weight"].float()
        logits = self.logits(batch["frames"]).float()
        loss = F.binary_cross_entropy_with_logits(logits, label, weight)
        right = ((logits > 0) == (label > 0.5)).float().mean()
        return loss, {"loss": loss, "accuracy": right}
