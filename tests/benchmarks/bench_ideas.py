"""What each optional idea does to small worlds whose rules are known: python tests/benchmarks/bench_ideas.py

Each row trains the same model with and without the idea, on the same data, for several seeds, and prints the median
and the range. Small worlds show whether an idea works at all, not what it is worth at scale.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.actions import LatentActionModel
from models.checkpoint import build_model
from models.config import (
    ActionsConfig,
    CodebookConfig,
    DynamicsConfig,
    SamplerConfig,
    TokenizerConfig,
    TransformerConfig,
)
from models.dynamics import Dynamics
from models.fewstep import Distillation
from models.sampler import Decoder, Window
from models.world import World
from pipelines.measures import agreement
from tests.pipelines.ring import footage

SEEDS = (0, 1, 2)
SIDE, CODES = 4, 16
TOKENS = SIDE * SIDE
Batch = dict[str, Tensor]
Settings = dict[str, object]


def shape(frames: int, window: int = 0, layers: int = 6) -> TransformerConfig:
    return TransformerConfig(layers=layers, width=48, heads=2, head_size=24, window=window or frames)


def dynamics_of(frames: int, window: int = 0, actions: int = 3, **changes: object) -> Dynamics:
    settings = dict(
        rows=SIDE, columns=SIDE, vocabulary=CODES, actions=actions, frames=frames, transformer=shape(frames, window)
    )
    return build_model("dynamics", DynamicsConfig(**(settings | changes)))  # fmt: skip


def fit(model: nn.Module, batch: Callable[[int], Batch], steps: int, rate: float = 3e-3) -> None:
    """AdamW for some steps, each on a batch of its own."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * min(1, 4 * (1 - step / steps))
        model.begin_step(step, steps)
        optimizer.zero_grad()
        model(batch(step))[0].backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        model.end_step()
    model.eval()


def world_of(dynamics: Dynamics) -> World:
    """The dynamics behind a tokenizer that nobody looks at."""
    frames, window = dynamics.cfg.frames, dynamics.cfg.transformer.window
    plain = replace(shape(frames, window, 2), attention="none")
    codes = CodebookConfig(size=CODES, dim=4)
    cfg = TokenizerConfig(
        height_px=SIDE, width_px=SIDE, patch=1, frames=frames, encoder=plain, decoder=plain, codebook=codes
    )
    return World(build_model("tokenizer", cfg), None, dynamics)  # fmt: skip


def played(dynamics: Dynamics, windows: Sequence[Window], actions_BT: Tensor, sampler: SamplerConfig) -> Tensor:
    """Tokens (B, T, N) of rollouts."""
    decoder = Decoder(world_of(dynamics), len(windows), sampler)
    for slot, window in enumerate(windows):
        decoder.restore(slot, window)
    out = torch.zeros(*actions_BT.shape, TOKENS, dtype=torch.int64)
    for t in range(actions_BT.shape[1]):
        for slot in range(len(windows)):
            decoder.begin(slot, int(actions_BT[slot, t]))
        waiting = len(windows)
        while waiting:
            for done in decoder.advance():
                out[done.slot, t] = done.tokens
                waiting -= 1
    return out


# -- worlds of tokens ----------------------------------------------------------------------------------------------


def turning(count: int, frames: int, seed: int, flipped: bool = False) -> Batch:
    """A picture turns left, stays or turns right. Flipped: in half of the videos left is right; their text says so."""
    g = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, CODES, (SIDE, 8), generator=torch.Generator().manual_seed(1))
    actions = torch.randint(0, 3, (count, frames - 1), generator=g)
    sign = torch.randint(0, 2, (count, 1), generator=g) * 2 - 1 if flipped else torch.ones(count, 1, dtype=torch.int64)
    start = torch.randint(0, 8, (count, 1), generator=g)
    place = torch.cat((start, start + (sign * (actions - 1)).cumsum(1)), dim=1)
    columns = (place[..., None] + torch.arange(SIDE)) % 8
    tokens = picture[:, columns].permute(1, 2, 0, 3).flatten(2)
    return {"tokens": tokens, "actions": actions, "key": torch.arange(count) + 1000 * seed, "text": (sign + 1) // 2}


def secret(count: int, frames: int, seed: int) -> Batch:
    """The first frame shows a code; later frames are blank but where action 1 asks for the code again."""
    g = torch.Generator().manual_seed(seed)
    code = torch.randint(1, CODES, (count,), generator=g)
    actions = (torch.rand(count, frames - 1, generator=g) < 0.3).long()
    shown = torch.cat((torch.ones(count, 1, dtype=torch.int64), actions), dim=1) * code[:, None]
    tokens = shown[..., None].expand(-1, -1, TOKENS).clone()
    tokens[:, 1:, 1:] = 0  # asked later, the code stands in one place
    return {"tokens": tokens, "actions": actions, "key": torch.arange(count) + 1000 * seed}


def rollout_accuracy(dynamics: Dynamics, made: Batch, known: int, sampler: SamplerConfig) -> float:
    windows = [
        Window(t[:known], a[: known - 1], known - 1, i, tuple(w.tolist()) if dynamics.cfg.words else ())
        for i, (t, a, w) in enumerate(zip(made["tokens"], made["actions"], made["text"], strict=True))
    ]
    drawn = played(dynamics, windows, made["actions"][:, known - 1 :], sampler)
    return float((drawn == made["tokens"][:, known:]).double().mean())


def context(seed: int, **changes: object) -> float:
    """Right tokens in 12 frames after one, for a model that was trained briefly."""
    torch.manual_seed(seed)
    model = dynamics_of(6, **changes)
    fit(model, lambda step: turning(16, 6, 10_000 * seed + step), 220)
    return rollout_accuracy(model, turning(24, 13, -1 - seed), 1, SamplerConfig(steps=4))


def words(seed: int, count: int) -> float:
    """Right tokens in the 4 frames after one where left may be right."""
    torch.manual_seed(seed)
    model = dynamics_of(5, words=count, text_vocabulary=2)
    fit(model, lambda step: turning(16, 5, 10_000 * seed + step, flipped=True), 300)
    return rollout_accuracy(model, turning(32, 5, -1 - seed, flipped=True), 1, SamplerConfig(steps=4))


def memory(seed: int, sliding: bool, wait: int) -> float:
    """Right answers when the code is asked for `wait` frames after it was shown; both caches hold 4 frames."""
    torch.manual_seed(seed)
    model = dynamics_of(12, window=4, actions=2) if sliding else dynamics_of(4, actions=2)
    frames = model.cfg.frames
    fit(model, lambda step: secret(16, frames, 10_000 * seed + step), 500)
    made = secret(32, 2, -1 - seed)
    actions = torch.zeros(32, wait, dtype=torch.int64)
    actions[:, -1] = 1
    windows = [Window(t[:1], torch.zeros(0, dtype=torch.int64), 0, i) for i, t in enumerate(made["tokens"])]
    policy = "rolling" if sliding else "epoch"
    drawn = played(model, windows, actions, SamplerConfig(steps=2, policy=policy, temperature=0))
    return float((drawn[:, -1, 0] == made["tokens"][:, 0, 0]).double().mean())


def slid(wait: int) -> tuple[Settings, Settings]:
    """Without and with a sliding window."""
    return {"sliding": False, "wait": wait}, {"sliding": True, "wait": wait}


def few_steps(seed: int, steps: int, distilled: bool = False) -> float:
    """How near drawn frames are to the nearest true one; half the key presses slip, so each frame may be one of two."""
    torch.manual_seed(seed)

    def slippery(count: int, number: int) -> Batch:
        made = turning(count, 3, number)
        slips = torch.rand(made["actions"].shape, generator=torch.Generator().manual_seed(number + 7)) < 0.5
        return {**made, "actions": torch.where(slips, 1, made["actions"])}

    teacher = dynamics_of(3)
    fit(teacher, lambda step: slippery(16, 10_000 * seed + step), 500)
    model = teacher
    if distilled:
        pair = Distillation(teacher, copy.deepcopy(teacher).requires_grad_(True), steps, 16)
        fit(pair, lambda step: slippery(16, 20_000 * (seed + 1) + step), 150, 1e-3)
        model = pair.student
    made = turning(64, 3, -1 - seed)
    windows = [Window(t[:2], a[:1], 1, i) for i, (t, a) in enumerate(zip(made["tokens"], made["actions"], strict=True))]
    still = torch.ones(64, 1, dtype=torch.int64)
    drawn = played(model, windows, still, SamplerConfig(steps=steps, order="halton"))[:, 0]
    picture = turning(400, 2, 5)["tokens"].flatten(0, 1).unique(dim=0)
    return float((drawn[:, None] == picture).double().mean(-1).amax(-1).mean())


# -- latent actions from pixels --------------------------------------------------------------------------------------


def found_actions(seed: int, size: int = 3, **changes: object) -> float:
    """Normalised mutual information of the codes with the true keys."""
    torch.manual_seed(seed)
    one = TransformerConfig(layers=2, width=48, heads=2, head_size=16, window=5)
    codes = CodebookConfig(size=size, dim=8, warmup_share=0.4)
    cfg = ActionsConfig(
        height_px=16, width_px=16, patch=4, frames=5, encoder=one, decoder=one, codebook=codes, **changes
    )
    model = build_model("actions", cfg)
    assert isinstance(model, LatentActionModel)

    def batch(step: int) -> Batch:
        frames, _ = footage(16, 5, 10_000 * (seed + 1) + step)
        return {"frames": torch.from_numpy(frames), "key": torch.arange(16) + 16 * step}

    fit(model, batch, 260)
    frames, keys = footage(64, 5, seed)
    codes_BT = model.infer(torch.from_numpy(frames)).numpy()
    return agreement(codes_BT.ravel(), keys.ravel())


ROLLOUT, NEAREST = "tokens right over 12 frames", "tokens as in the nearest true frame, 2 steps"
ROWS: list[tuple[str, str, Callable[..., float], Settings, Settings]] = [
    ("complete teacher forcing", ROLLOUT, context, {}, {"masking": "ctf"}),
    ("a mask rate per frame", ROLLOUT, context, {}, {"masking": "per_frame"}),
    ("clean past for half the samples", ROLLOUT, context, {}, {"single_share": 0.5}),
    ("corrupted context 0.2", ROLLOUT, context, {}, {"corruption": 0.2}),
    ("words as a prefix", "tokens right where a text says which way keys turn", words, {"count": 0}, {"count": 1}),
    ("sliding window of 4 in 12 frames", "codes recalled after 3 frames", memory, *slid(3)),
    ("sliding window of 4 in 12 frames", "codes recalled after 8 frames", memory, *slid(8)),
    ("distilled to 2 steps", NEAREST, few_steps, {"steps": 2}, {"steps": 2, "distilled": True}),
    ("16 steps instead of 2", NEAREST, few_steps, {"steps": 2}, {"steps": 16}),
    ("InfoNCE 0.1", "NMI of 3 codes with 3 keys", found_actions, {}, {"contrast": 0.1}),
    ("two-level codebook 3 x 2", "NMI of 6 codes with 3 keys", found_actions, {"size": 6}, {"size": 6, "coarse": 3}),
]


def main() -> None:
    torch.set_num_threads(1)
    sys.stdout.write("| idea | measure | without: median (range) | with | effect |\n|---|---|---|---|---|\n")
    for idea, measure, work, without, with_it in ROWS:
        if len(sys.argv) > 1 and sys.argv[1] not in idea:
            continue
        base, ours = ([work(seed, **settings) for seed in SEEDS] for settings in (without, with_it))
        shown = " | ".join(f"{statistics.median(v):.2f} ({min(v):.2f}..{max(v):.2f})" for v in (base, ours))
        effect = "better" if min(ours) > max(base) else "worse" if max(ours) < min(base) else "none beyond the seeds"
        sys.stdout.write(f"| {idea} | {measure} | {shown} | {effect} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
