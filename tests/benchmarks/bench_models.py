"""Ratios of the models' costs on one CPU thread, measured side by side: python tests/benchmarks/bench_models.py

Times are CPU time of this process. The two sides of a ratio take turns, and the median of the rounds is printed.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from infra.memory import keep_freed_memory
from models.attention import SpatialAttention, TemporalAttention
from models.checkpoint import build_model
from models.config import CodebookConfig, DynamicsConfig, SamplerConfig, TokenizerConfig, TransformerConfig
from models.dynamics import Dynamics
from models.maskgit import reveal_counts
from models.sampler import Decoder
from models.transformer import Transformer
from models.world import World
from pipelines.presets import toy_world


def least_s(work: Callable[[], object], rounds: int = 5) -> float:
    work()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def ratio(over: Callable[[], object], under: Callable[[], object], rounds: int = 9) -> float:
    """The median of the two's ratio, measured in turns."""
    return statistics.median(least_s(over, 1) / least_s(under, 1) for _ in range(rounds))


def world_of(width: int, side: int, layers: int, frames: int, codes: int = 1024) -> World:
    """A world whose dynamics has the given shape; its tokenizer is as small as can be, so that it does not count."""
    small = TransformerConfig(layers=1, width=16, heads=1, head_size=16, attention="none")
    tokenizer = TokenizerConfig(
        height_px=side,
        width_px=side,
        patch=1,
        frames=frames,
        encoder=small,
        decoder=small,
        codebook=CodebookConfig(size=codes, dim=8),
    )
    shape = TransformerConfig(layers=layers, width=width, heads=4, head_size=width // 4, window=frames)
    dynamics = DynamicsConfig(rows=side, columns=side, vocabulary=codes, actions=6, frames=frames, transformer=shape)
    return World(build_model("tokenizer", tokenizer), None, build_model("dynamics", dynamics))


def toy_world_of_presets() -> World:
    config = toy_world()
    return World(build_model("tokenizer", config.tokenizer), None, build_model("dynamics", config.dynamics))


def filled(world: World, slots: int, steps: int) -> Decoder:
    """A decoder whose sessions have played half of their memory."""
    decoder = Decoder(world, slots, SamplerConfig(steps=steps))
    prompt = torch.zeros(1, *world.frame_shape, dtype=torch.uint8)
    for slot in range(slots):
        decoder.restore(slot, world.prompt_window(prompt, slot))
    return decoder


def one_frame(decoder: Decoder) -> None:
    """Every session draws a frame and commits it; memory is rewound so that each call does the same work."""
    for session in decoder._slots:
        assert session is not None
        session.position = session.cached = world_half = decoder.frames // 2
        session.window.tokens = session.window.tokens[:1].expand(world_half, -1)
        session.window.actions = torch.zeros(world_half - 1, dtype=torch.int64)
    for slot in range(decoder.slots):
        decoder.begin(slot, 0)
    while decoder.busy:
        decoder.advance()


def cached_against_full() -> list[tuple[str, float, str]]:
    world = world_of(256, 16, 6, 16)
    tokens, actions = torch.zeros(1, 16, 256, dtype=torch.int64), torch.zeros(1, 15, dtype=torch.int64)
    other, place = filled(world, 1, 25), torch.arange(256)

    def full_pass() -> None:
        with torch.inference_mode():
            logits = world.dynamics.logits(tokens, actions)[0, -1]
            other.revealer.drawn(logits, place, *torch.zeros(3, len(place), dtype=torch.int64))

    rows = []
    for steps, bar in ((8, 10), (25, 14)):
        decoder = filled(world, 1, steps)
        found = steps * ratio(full_pass, lambda decoder=decoder: one_frame(decoder))
        rows.append((f"full-window over cached decoding, {steps} steps (6 layers, 256 wide, 256 tokens, T 16)",
                     found, f"at least {bar}"))  # fmt: skip
    return rows


def matrix_products(model: nn.Module, shape: tuple[int, int, int], backward: bool) -> Callable[[], None]:
    """Does all products of a pass over (frames, tokens, frames seen), linear and attention."""
    frames, tokens, seen = shape
    work: list[tuple[Tensor, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            x, w = (
                torch.randn(frames * tokens, module.in_features),
                torch.randn(module.in_features, module.out_features),
            )
            work.append((x, w, x @ w))
        elif isinstance(module, SpatialAttention | TemporalAttention):
            h, d = module.heads, module.size
            space = isinstance(module, SpatialAttention)
            batch, long, wide = (frames * h, tokens, tokens) if space else (tokens * h, frames, seen)
            q, k = torch.randn(batch, long, d), torch.randn(batch, d, wide)
            work += [(q, k, q @ k), (q @ k, k.mT.contiguous(), q)]

    def products() -> None:
        for x, w, g in work:
            x @ w
            if backward:
                g @ w.mT
                x.mT @ g

    return torch.inference_mode()(products)


def decoding_over_matrix_products() -> list[tuple[str, float, str]]:
    rows = []
    world = world_of(256, 16, 6, 16)
    decoder = filled(world, 1, 8)
    whole = matrix_products(world.dynamics, (1, 256, 16), False)
    found = ratio(lambda: one_frame(decoder), whole) / 9
    rows.append(("decoding pass over all products of a pass, 256 wide", found, "at most 1.25"))
    # a frame's eight passes finish (last feed-forward, head) the places that are still unknown, its commit pass none
    blocks, last = world.dynamics.transformer.blocks, world.dynamics.transformer.blocks[-1].feed
    body = matrix_products(nn.ModuleList([*blocks[:-1], blocks[-1].spatial, blocks[-1].temporal]), (1, 256, 16), False)
    ends = nn.ModuleList([last, world.dynamics.head])
    rest = [matrix_products(ends, (1, 256 - known, 16), False) for known in (0, *reveal_counts(256, 8)[:-1])]
    found = ratio(lambda: one_frame(decoder), lambda: [work() for work in (*[body] * 9, *rest)])
    rows.append(("decoding pass over the products that it does, 256 wide", found, "at most 1.25"))
    return rows


def training_over_matrix_products() -> list[tuple[str, float, str]]:
    rows = []
    ours, plain, products = training_step(256)
    rows.append(("training step over its matrix products, 256 wide", ratio(ours, products), "at most 1.25"))
    rows.append(("plain implementation's training step over ours, 256 wide", ratio(plain, ours), "above 1"))
    return rows


class PlainAttention(nn.Module):
    """Textbook attention: separate projections, explicit scores, rotation by halves."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.qn, self.kn = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        y = self.norm(x)
        q, k, v = (p(y).view(B, L, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.qn(q), self.kn(k)
        if self.causal:
            angle = torch.arange(L)[:, None] * 100 ** (-torch.arange(0, q.shape[-1], 2) / q.shape[-1])
            cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
            q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.causal:
            scores = scores.masked_fill(~torch.ones(L, L, dtype=torch.bool).tril(), -torch.inf)
        return x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, D))


class PlainBlock(nn.Module):
    """A straightforward space-time block with the same sizes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.space, self.time = PlainAttention(width, heads, False), PlainAttention(width, heads, True)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, N, D = x.shape
        x = self.space(x.reshape(B * T, N, D)).view(B, T, N, D)
        x = self.time(x.transpose(1, 2).reshape(B * N, T, D)).view(B, N, T, D).transpose(1, 2)
        return x + self.feed(x)


def training_step(width: int, frames: int = 16, tokens: int = 256) -> list[Callable[[], None]]:
    """Forward and backward of 3 blocks: ours, plain, and the matrix products alone."""
    shape = TransformerConfig(layers=6, width=width, heads=4, head_size=width // 4, window=frames)
    ours, plain = Transformer(shape).train(), nn.Sequential(*[PlainBlock(width, 4) for _ in range(3)])
    x = torch.randn(1, frames, tokens, width)
    steps = [lambda model=model: model(x.requires_grad_()).sum().backward() for model in (ours, plain)]
    return [*steps, matrix_products(ours, (frames, tokens, frames), True)]


def power(lengths: Tensor, values: list[float]) -> float:
    """The exponent of a fit values = a lengths^b."""
    y = torch.tensor(values, dtype=torch.float64).log()[:, None]
    return float(torch.linalg.lstsq(torch.stack((lengths.log(), torch.ones(len(lengths))), 1).double(), y).solution[0])


def saved_bytes(work: Callable[[], object]) -> float:
    """What a forward pass keeps for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = work()
    del held
    return float(sum(kept.values()))


def linear_in_time() -> list[tuple[str, float, str]]:
    lengths = torch.tensor([4, 8, 16, 32], dtype=torch.float64)
    took, kept = [], []
    for frames in lengths.int().tolist():
        shape = TransformerConfig(layers=6, width=128, heads=4, head_size=32, window=16)
        model = Dynamics(DynamicsConfig(rows=8, columns=8, vocabulary=512, frames=frames, transformer=shape)).train()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        batch = {"tokens": torch.zeros(2, frames, 64, dtype=torch.int64), "key": torch.arange(2),
                 "actions": torch.zeros(2, frames - 1, dtype=torch.int64)}  # fmt: skip
        took.append(least_s(lambda model=model, batch=batch: model(batch)[0].backward(), 3))
        kept.append(saved_bytes(lambda model=model, batch=batch: model(batch)[0]) - weights)
    return [
        ("training step grows with T to the power (T 4..32)", power(lengths, took), "about 1"),
        ("what it keeps for the backward pass grows with T to the power", power(lengths, kept), "about 1"),
    ]


def batching() -> list[tuple[str, float, str]]:
    rows = []
    shapes = ((toy_world_of_presets(), "preset toy", "under 3"), (world_of(256, 16, 6, 16), "256 wide", "at most 8"))
    for world, name, bar in shapes:
        eight, one = filled(world, 8, 8), filled(world, 1, 8)
        found = ratio(lambda eight=eight: one_frame(eight), lambda one=one: one_frame(one))
        rows.append((f"8 sessions in one batch over one alone, {name}", found, bar))
    return rows


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    decoding = (cached_against_full, decoding_over_matrix_products, batching)
    for part in (*decoding, training_over_matrix_products, linear_in_time):
        if part not in decoding:
            keep_freed_memory()  # as a training does and a server doesn't
        for what, ratio, bar in part():
            sys.stdout.write(f"{ratio:8.2f}  {what} ({bar})\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
