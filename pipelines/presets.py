"""Chosen values: whole configurations as plain functions. Worlds first, then paths; `COMMAND_PRESETS` names them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.config import (
    ActionsConfig,
    Attention,
    CodebookConfig,
    DynamicsConfig,
    PolicyConfig,
    SamplerConfig,
    TokenizerConfig,
    TransformerConfig,
    WorldConfig,
)
from pipelines.config import (
    CurateConfig,
    EvaluateConfig,
    PathConfig,
    RecordConfig,
    ReportConfig,
    RulesConfig,
    TokenizeConfig,
)
from pipelines.train_config import FeedConfig, OptimizerConfig, TrainConfig

# -- worlds that a laptop trains -----------------------------------------------------------------------------------


def _small(layers: int, width: int, frames: int, attention: Attention = "st") -> TransformerConfig:
    """A small transformer with 4 heads that see the whole window."""
    return TransformerConfig(
        layers=layers, width=width, heads=4, head_size=width // 4, attention=attention, window=frames
    )


def _square_world(
    *,
    side_px: int,
    patches: tuple[int, int],
    codes: CodebookConfig,
    actions: CodebookConfig,
    tokenizer: tuple[TransformerConfig, TransformerConfig],
    action_model: TransformerConfig,
    dynamics: TransformerConfig,
) -> WorldConfig:
    """A world of square pictures at 10 FPS whose window is the dynamics' own.

    Args:
        patches: sides in pixels of the tokenizer's and of the latent action model's patches.
        tokenizer: encoder and decoder.
        action_model: its encoder's and decoder's shape.
    """
    frames, rows = dynamics.window, side_px // patches[0]
    return WorldConfig(
        fps=10.0,
        tokenizer=TokenizerConfig(
            height_px=side_px, width_px=side_px, patch=patches[0], frames=frames,
            encoder=tokenizer[0], decoder=tokenizer[1], codebook=codes,
        ),
        actions=ActionsConfig(
            height_px=side_px, width_px=side_px, patch=patches[1], frames=frames,
            encoder=action_model, decoder=action_model, codebook=actions,
        ),
        dynamics=DynamicsConfig(
            rows=rows, columns=rows, vocabulary=codes.size, actions=actions.size, frames=frames, transformer=dynamics
        ),
    )  # fmt: skip


def demo_world() -> WorldConfig:
    """CoinRun at 64x64 and 10 FPS for ten minutes on two cores, chosen by trials (docs/training.md).

    Two departures from the paper: the tokenizer's encoder looks at each patch by itself (tokens then stay the same
    when the picture shifts by whole patches, so that dynamics learn early), and the latent action model predicts a
    change of the last frame (so that it does not first learn the palette). `coinrun` is the faithful preset.
    """
    return _square_world(
        side_px=64,
        patches=(8, 16),
        codes=CodebookConfig(size=256, dim=16, decay=0.97, warmup_share=0.2),
        actions=CodebookConfig(size=6, dim=8, warmup_share=0.2, channel=0.0),
        tokenizer=(_small(2, 96, 8, "none"), _small(2, 96, 8, "space")),
        action_model=_small(4, 64, 8),
        dynamics=_small(6, 96, 8),
    )


def tiny_world() -> WorldConfig:
    """The demo's shape at a size that learns nothing in seconds: to see that every step works."""
    return _square_world(
        side_px=32,
        patches=(8, 16),
        codes=CodebookConfig(size=32, dim=8),
        actions=CodebookConfig(size=4, dim=8, warmup_share=0.2),
        tokenizer=(_small(1, 32, 4, "none"), _small(1, 32, 4, "space")),
        action_model=_small(2, 32, 4),
        dynamics=_small(2, 32, 4),
    )


def toy_world() -> WorldConfig:
    """The paper's architecture in small: space-time transformers everywhere, 32x32 pixels, under a million weights."""
    return _square_world(
        side_px=32,
        patches=(4, 4),
        codes=CodebookConfig(size=128, dim=16, decay=0.97, warmup_share=0.2),
        actions=CodebookConfig(size=6, dim=8, warmup_share=0.4),
        tokenizer=(_small(2, 64, 8), _small(2, 64, 8)),
        action_model=_small(4, 64, 8),
        dynamics=_small(6, 64, 8),
    )


def demo_policy() -> PolicyConfig:
    """Four frames of 8-pixel patches, as the demo's dynamics see them."""
    return PolicyConfig(patch=8, frames=4, transformer=_small(6, 96, 4))


# -- paths -------------------------------------------------------------------------------------------------------


def demo_path(home: Path = Path("lampworks-home")) -> PathConfig:
    """The whole path in about 17 minutes on two cores."""
    world = demo_world()
    return PathConfig(
        home=home,
        record=RecordConfig(home=home),
        curate=CurateConfig(home=home, width_px=64, height_px=64),
        tokenizer=TrainConfig(
            home=home,
            stage="tokenizer",
            model=world,
            steps=800,
            batch=16,
            micro_batch=8,
            optimizer=OptimizerConfig(lr=2e-3, final_lr=2e-4, warmup_steps=50),
        ),
        tokenize=TokenizeConfig(home=home),
        world=TrainConfig(
            home=home,
            stage="world",
            model=world,
            steps=1200,
            batch=16,
            micro_batch=8,
            optimizer=OptimizerConfig(lr=1.5e-3, final_lr=1.5e-4, warmup_steps=50),
        ),
        evaluate=EvaluateConfig(home=home, sampler=SamplerConfig(steps=8)),
        report=ReportConfig(home=home),
    )


def tiny_path(home: Path = Path("lampworks-home")) -> PathConfig:
    """The same steps in a minute or two; its world is not worth playing."""
    world = tiny_world()
    learning = OptimizerConfig(lr=2e-3, final_lr=2e-4, warmup_steps=4)
    feed = FeedConfig(windows_per_clip=4, clips_per_group=8)
    return PathConfig(
        home=home,
        record=RecordConfig(home=home, episodes=6, side_games=("ninja",), min_s=6, max_s=9),
        curate=CurateConfig(
            home=home, width_px=32, height_px=32, clip_frames=40, holdout_share=0.3, rules=RulesConfig(min_duration_s=4)
        ),
        tokenizer=TrainConfig(
            home=home,
            stage="tokenizer",
            model=world,
            steps=12,
            batch=8,
            micro_batch=4,
            optimizer=learning,
            feed=feed,
            log_every=4,
            picture_every=0,
        ),
        tokenize=TokenizeConfig(home=home),
        world=TrainConfig(
            home=home,
            stage="world",
            model=world,
            steps=12,
            batch=8,
            micro_batch=4,
            optimizer=learning,
            feed=feed,
            log_every=4,
            picture_every=6,
        ),
        evaluate=EvaluateConfig(home=home, clips=8, prompts=2, sampler=SamplerConfig(steps=2)),
        report=ReportConfig(home=home),
    )


def _demo_policy() -> TrainConfig:
    """For the world of the demo, after it."""
    world = demo_path().world
    return replace(world, stage="policy", actions="world", policy=demo_policy(), steps=600, batch=32, micro_batch=16)


def _genie_11b() -> TrainConfig:
    from pipelines.paper import genie_11b_training  # which stands on this file

    return genie_11b_training()


COMMAND_PRESETS: dict[str, dict[str, Callable[[], Any]]] = {
    "record": {"demo": lambda: demo_path().record, "tiny": lambda: tiny_path().record},
    "curate": {"demo": lambda: demo_path().curate, "tiny": lambda: tiny_path().curate},
    "train": {
        "demo-tokenizer": lambda: demo_path().tokenizer,
        "demo-world": lambda: demo_path().world,
        "demo-policy": _demo_policy,
        "tiny-tokenizer": lambda: tiny_path().tokenizer,
        "tiny-world": lambda: tiny_path().world,
        "genie-11b": _genie_11b,
    },
}
"""command -> preset name -> the command's configuration (`lampworks COMMAND --preset NAME`)."""
