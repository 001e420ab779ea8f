"""The paper's models as presets, with computed sizes beside the published ones (tables 5, 7, 10-12, appendix F)."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from models.config import ActionsConfig, CodebookConfig, DynamicsConfig, TokenizerConfig, TransformerConfig, WorldConfig
from models.cost import cost
from pipelines.presets import toy_world
from pipelines.train_config import FeedConfig, OptimizerConfig, TrainConfig

_FRAMES = 16


def _st(layers: int, width: int, heads: int, head_size: int = 64) -> TransformerConfig:
    return TransformerConfig(layers=layers, width=width, heads=heads, head_size=head_size, window=_FRAMES)


def tokenizer_200m() -> TokenizerConfig:
    """The ST-ViViT tokenizer for 160x90 video (table 7): 40 x 23 tokens, the height padded to 92."""
    return TokenizerConfig(
        height_px=90,
        width_px=160,
        patch=4,
        frames=_FRAMES,
        encoder=_st(12, 512, 8),
        decoder=_st(20, 1024, 16),
        codebook=CodebookConfig(size=1024, dim=32, kind="vq"),
    )


def lam_300m() -> ActionsConfig:
    """The latent action model on pixels (table 5), as published: no residual, no difference, no warm-up."""
    return ActionsConfig(
        height_px=90,
        width_px=160,
        patch=16,
        frames=_FRAMES,
        encoder=_st(20, 1024, 16),
        decoder=_st(20, 1024, 16),
        codebook=CodebookConfig(size=8, dim=32, kind="vq"),
        residual=False,
        difference=False,
    )


def _genie(layers: int, heads: int, width: int, head_size: int) -> WorldConfig:
    dynamics = DynamicsConfig(
        rows=23,
        columns=40,
        vocabulary=1024,
        actions=8,
        frames=_FRAMES,
        transformer=_st(layers, width, heads, head_size),
    )
    return WorldConfig(fps=10.0, tokenizer=tokenizer_200m(), actions=lam_300m(), dynamics=dynamics)


def coinrun_world() -> WorldConfig:
    """The reproducible case study on CoinRun, 64x64 (appendix F)."""
    return WorldConfig(
        fps=10.0,
        tokenizer=TokenizerConfig(
            height_px=64,
            width_px=64,
            patch=4,
            frames=_FRAMES,
            encoder=_st(8, 512, 8),
            decoder=_st(8, 512, 8),
            codebook=CodebookConfig(size=1024, dim=32, kind="vq"),
        ),
        actions=ActionsConfig(
            height_px=64,
            width_px=64,
            patch=16,
            frames=_FRAMES,
            encoder=_st(8, 512, 8),
            decoder=_st(8, 512, 8),
            codebook=CodebookConfig(size=6, dim=32, kind="vq"),
            residual=False,
            difference=False,
        ),
        dynamics=DynamicsConfig(
            rows=16, columns=16, vocabulary=1024, actions=6, frames=_FRAMES, transformer=_st(12, 512, 8)
        ),
    )


# layers, heads, width, k/q size -> the paper's parameter count of the dynamics (tables 10-12)
_SHAPES: dict[str, tuple[tuple[int, int, int, int], float | None]] = {
    "genie-41m": ((18, 8, 512, 64), 41e6),
    "genie-96m": ((16, 16, 768, 64), 96e6),
    "genie-192m": ((20, 18, 1024, 64), 192e6),
    "genie-404m": ((21, 12, 1536, 128), 404e6),
    "genie-811m": ((20, 20, 2048, 128), 811e6),
    "genie-1.6b": ((28, 22, 2560, 128), 1.6e9),
    "genie-2.3b": ((34, 20, 2560, 128), None),  # 2.3B with tokenizer and latent action model
    "genie-2.7b": ((36, 22, 3072, 128), 2.7e9),
    "genie-11b": ((48, 36, 5120, 128), None),  # 10.1B with tokenizer and latent action model, rounded up to 11B
    "robotics-2.5b": ((38, 20, 2560, 128), None),  # the paper gives the size alone; the shape is ours
}
_TOTALS = {"genie-2.3b": 2.3e9, "genie-11b": 10.1e9, "robotics-2.5b": 2.5e9}
_TRAINING = {  # batch, steps of the dynamics (tables 8 and 10, appendix F) and the paper's tokens
    "coinrun": (36, 200_000, None),
    "genie-11b": (512, 125_000, 942e9),
}

WORLDS: dict[str, Callable[[], WorldConfig]] = {
    "toy": toy_world,
    "coinrun": coinrun_world,
    **{name: lambda shape=shape: _genie(*shape) for name, (shape, _) in _SHAPES.items()},
}
NAMES = ("toy", "coinrun", "tokenizer-200m", "lam-300m", *_SHAPES)


def genie_11b_training() -> TrainConfig:
    """The final model's dynamics and latent action model, co-trained (paper, section 3.2 and table 9), on 64 H200.

    Where the paper shards everything (ZeRO-3 on TPUs), optimizer states do here, which fits from 8 H200 on.
    """
    world = WORLDS["genie-11b"]()
    actions = replace(
        world.actions, encoder=_recomputed(world.actions.encoder), decoder=_recomputed(world.actions.decoder)
    )
    dynamics = replace(world.dynamics, transformer=_recomputed(world.dynamics.transformer))
    batch, steps, _ = _TRAINING["genie-11b"]
    return TrainConfig(
        stage="world",
        model=replace(world, actions=actions, dynamics=dynamics),
        batch=batch,
        micro_batch=2,
        steps=steps,
        optimizer=OptimizerConfig(lr=3e-5, final_lr=3e-6, schedule="cosine", warmup_steps=5000),
        zero=1,
        precision="bf16",
        gpu=True,
        workers=64,
        picture_every=5000,
        feed=FeedConfig(readers=64),
    )


def _recomputed(shape: TransformerConfig) -> TransformerConfig:
    return replace(shape, checkpointing=True)


@dataclass(frozen=True)
class Row:
    """One line of `lampworks show preset`: what, computed here, in the paper (None: not given)."""

    item: str
    computed: float
    paper: float | None = None

    @property
    def gap(self) -> float | None:
        """Computed over published, less one."""
        return self.computed / self.paper - 1 if self.paper else None


def describe(name: str, steps: int = 25) -> list[Row]:
    """Sizes and costs of a preset beside the paper's figures, on the meta device.

    Args:
        name: one of NAMES.
        steps: refinement passes per generated frame.
    """
    if name == "tokenizer-200m":
        return _part("tokenizer", tokenizer_200m(), 200e6)
    if name == "lam-300m":
        return _part("latent action model", lam_300m(), 300e6)
    world = WORLDS[name]()
    published = _SHAPES[name][1] if name in _SHAPES else None
    dynamics = cost(world.dynamics)
    rows = [
        *_part("tokenizer", world.tokenizer, 200e6 if name in _SHAPES else None),
        *_part("latent action model", world.actions, 300e6 if name in _SHAPES else None),
        *_part("dynamics", world.dynamics, published),
        Row("dynamics: operations per generated frame, cached", (steps + 1) * dynamics.cached_flops),
        Row("dynamics: cache of a session in bf16, bytes", 2 * dynamics.cache_values),
    ]
    total = sum(row.computed for row in rows if row.item.endswith(": parameters"))
    rows.append(Row("all: parameters", total, _TOTALS.get(name)))
    rows.append(Row("tokens per frame", world.dynamics.tokens, 920 if name in _SHAPES else None))
    if name in _SHAPES or name in _TRAINING:
        batch, updates, tokens = _TRAINING.get(name, (256, 200_000, 750e9))
        seen = batch * updates * world.frames * world.dynamics.tokens
        rows.append(Row("dynamics: training tokens", seen, tokens))
        rows.append(Row("dynamics: training operations", seen / world.dynamics.tokens * dynamics.training_flops,
                        6.6e22 if name == "genie-11b" else None))  # fmt: skip
    return rows


def _part(label: str, config: TokenizerConfig | ActionsConfig | DynamicsConfig, published: float | None) -> list[Row]:
    found = cost(config)
    return [
        Row(f"{label}: parameters", found.parameters, published),
        Row(f"{label}: operations per frame, training", found.training_flops),
    ]
