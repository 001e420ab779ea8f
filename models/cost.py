"""What a model costs: parameters and floating-point operations, counted without allocating any memory."""

import math
import resource
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.checkpoint import build_model
from models.config import (
    ActionsConfig,
    DynamicsConfig,
    PolicyConfig,
    QualityConfig,
    TokenizerConfig,
    TransformerConfig,
)
from models.quality import QualityNet

ModelConfig = TokenizerConfig | ActionsConfig | DynamicsConfig | PolicyConfig
_KIND = {TokenizerConfig: "tokenizer", ActionsConfig: "actions", DynamicsConfig: "dynamics", PolicyConfig: "policy"}


@dataclass(frozen=True)
class Cost:
    """Parameters, and operations (a multiply-add is two) per frame of a training window.

    Attributes:
        parameters: trained weights.
        forward_flops: of one frame in a whole window.
        cached_flops: of one frame-pass with a full cache; a generated frame takes steps + 1 of the dynamics'.
        cache_values: numbers that a session's cache holds.
    """

    parameters: int
    forward_flops: float
    cached_flops: float
    cache_values: int

    @property
    def training_flops(self) -> float:
        """Forward and backward, per frame."""
        return 3 * self.forward_flops


def on_meta(config: ModelConfig) -> nn.Module:
    """A model whose weights take no memory."""
    with torch.device("meta"):
        return build_model(_KIND[type(config)], config)


def parameters(config: ModelConfig) -> int:
    """Trained weights of a model."""
    return sum(p.numel() for p in on_meta(config).parameters())


def transformer_flops(cfg: TransformerConfig, tokens: int, past: float) -> float:
    """Operations of one frame of `tokens`, each layer in time seeing `past` frames with its own."""
    heads, D = cfg.heads * cfg.head_size, cfg.width
    in_time = cfg.layers if cfg.attention == "full" else cfg.layers // 2 if cfg.attention == "st" else 0
    in_space = cfg.layers - in_time if cfg.attention in ("st", "space") else 0
    blocks = -(-cfg.layers // 2) if cfg.attention == "st" else cfg.layers
    kv = (cfg.kv_heads or cfg.heads) * cfg.head_size
    project = 2 * tokens * D * (in_space * 4 * heads + in_time * (2 * heads + 2 * kv))
    seen = past * (tokens if cfg.attention == "full" else 1)
    attend = 4 * tokens * heads * (in_space * tokens + in_time * seen)
    return project + attend + 2 * tokens * blocks * 2 * D * int(D * cfg.ff_ratio)


def _cache_values(cfg: TransformerConfig, tokens: int, frames: int) -> int:
    in_time = cfg.layers if cfg.attention == "full" else cfg.layers // 2 if cfg.attention == "st" else 0
    return 2 * in_time * tokens * frames * (cfg.kv_heads or cfg.heads) * cfg.head_size


def cost(config: ModelConfig) -> Cost:
    """The cost of a model, by component; a window's first frames see less past, which the averages account for."""
    frames = config.frames
    if isinstance(config, DynamicsConfig):
        cfg, N = config.transformer, config.tokens + config.prefix
        streams = 2 if config.masking == "ctf" else 1
        ends = 2 * config.tokens * cfg.width * config.vocabulary
        past = min(cfg.window, (frames + 1) / 2)
        return Cost(
            parameters(config),
            streams * transformer_flops(cfg, N, past) + ends,
            transformer_flops(cfg, N, min(cfg.window, frames)) + ends,
            _cache_values(cfg, N, frames),
        )
    N, pixels = config.rows * config.columns, config.patch**2 * 3
    forward = cached = 0.0
    parts = [config.transformer] if isinstance(config, PolicyConfig) else [config.encoder, config.decoder]
    for cfg in parts:
        ends = 2 * N * cfg.width * pixels
        forward += transformer_flops(cfg, N, min(cfg.window, (frames + 1) / 2)) + ends
        cached = transformer_flops(cfg, N, min(cfg.window, frames)) + ends  # the decoder's, which comes last
    return Cost(parameters(config), forward, cached, _cache_values(parts[-1], N, frames))


def ceiling_flops(device: str, took_s: float = 0.2) -> float:
    """Operations a second that square fp32 products reach here, as many threads as torch has: the best of `took_s`."""
    x, best, until = torch.ones(768, 768, device=device), math.inf, time.perf_counter() + took_s
    while time.perf_counter() < until:
        began = time.perf_counter()
        float((x @ x)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * 768**3 / best


def memory_bytes(device: str) -> float:
    """The most that this process has held so far: of the GPU's memory, or of the machine's (Linux, in kB)."""
    if device.startswith("cuda"):
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quality_cost(cfg: QualityConfig) -> tuple[int, float]:
    """Parameters, and operations of a training step per thumbnail (forward and backward); takes no memory."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = QualityNet(cfg)
        net.logits(torch.zeros((1, 1, cfg.height_px, cfg.width_px, 3), dtype=torch.uint8))
    return sum(p.numel() for p in net.parameters()), 3.0 * counter.get_total_flops()
