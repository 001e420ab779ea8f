"""Frozen settings of every model, validated before anything is built; imports no torch.

Legend of shapes, used as suffixes in this package: B batch, T frames, H W pixels, C channels, N tokens per frame,
D width, K codebook size, A actions, S slots (sessions) of a decoder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from math import prod
from typing import Any, Literal, TypeVar, get_args

T = TypeVar("T")
Attention = Literal["st", "space", "none", "full"]
Codebook = Literal["ema", "vq", "cosine", "fsq"]
ActionMode = Literal["additive", "prepended", "film"]
Masking = Literal["genie", "per_frame", "ctf"]
Order = Literal["confidence", "random", "halton"]
Policy = Literal["epoch", "reprefill", "rolling"]


class ModelError(ValueError):
    """A model's settings, inputs or weights are wrong; the message says what, where and the fix."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ModelError(message)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(value > 0, f"{type(owner).__name__}.{name} is {value}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The space-time transformer (paper, section 2): spatial, then causal temporal attention, then one feed-forward."""

    layers: int = 8
    """Attention layers. With attention "st", spatial and temporal ones alternate, two to a block with one feed-forward
    (an odd last one is spatial), as the paper counts; else one to a block; with "none", feed-forward blocks."""
    width: int = 128
    """D, features per token."""
    heads: int = 4
    """Attention heads; heads x head_size need not be the width."""
    head_size: int = 32
    """Features per head ("k/q size" in the paper)."""
    kv_heads: int = 0
    """K/V heads of temporal attention, a divisor of heads; 0 for as many as heads."""
    ff_ratio: float = 4.0
    """Hidden features of the feed-forward, as a multiple of the width."""
    attention: Attention = "st"
    """st: the paper's; space: within a frame only (ViT); none: each patch for itself; full: every token of this and
    past frames at once (C-ViViT)."""
    window: int = 16
    """W: frames that temporal attention sees, its own included. Part of the model: training masks with it too."""
    qk_norm: bool = True
    """Normalise queries and keys (the paper does in the dynamics)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        _positive(self, "layers", "width", "heads", "head_size", "ff_ratio", "window")
        _one_of("TransformerConfig.attention", self.attention, get_args(Attention))
        _require(
            self.kv_heads >= 0 and (not self.kv_heads or self.heads % self.kv_heads == 0),
            f"TransformerConfig.kv_heads is {self.kv_heads}; it must be 0 or divide heads={self.heads}",
        )
        _require(self.head_size % 2 == 0, f"TransformerConfig.head_size is {self.head_size}; RoPE needs an even one")

    @property
    def temporal(self) -> bool:
        """Whether a frame's features depend on frames before it."""
        return self.attention == "full" or (self.attention == "st" and self.layers > 1)


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """A discrete bottleneck (VQ-VAE, arXiv 1711.00937; FSQ, arXiv 2309.15505)."""

    size: int = 1024
    """K, codes."""
    dim: int = 32
    """Features per code; with fsq, the number of levels."""
    kind: Codebook = "ema"
    """ema: codes follow the mean of their encodings; vq: codes learn by gradient (the paper); cosine: ema on the unit
    sphere; fsq: no codebook, each feature is rounded to its levels."""
    levels: tuple[int, ...] = ()
    """Levels per feature of fsq; their product is the size."""
    decay: float = 0.99
    """Of the moving averages behind ema and cosine."""
    commitment: float = 0.25
    """Weight of the pull of encodings to their codes."""
    revive_below: float = 0.05
    """A code used less than this share of the mean use is moved onto a live encoding."""
    warmup_share: float = 0.0
    """Share of training steps without quantization; at its end (at least one step) codes start by k-means."""
    channel: float = 0.03
    """Price of information in that warm-up: encodings pass a channel with unit noise and pay this for their energy, so
    that they carry what helps and nothing else; 0 passes them on as they are."""

    def __post_init__(self) -> None:
        _positive(self, "size", "dim")
        _one_of("CodebookConfig.kind", self.kind, get_args(Codebook))
        _require(0 <= self.warmup_share < 1, f"CodebookConfig.warmup_share is {self.warmup_share}; give one in [0, 1)")
        _require(self.channel >= 0, f"CodebookConfig.channel is {self.channel}; give 0 or more")
        _require(0 < self.decay < 1, f"CodebookConfig.decay is {self.decay}; give one in (0, 1)")
        if self.kind == "fsq":
            _require(
                prod(self.levels) == self.size and len(self.levels) == self.dim and min(self.levels) > 1,
                f"CodebookConfig.levels is {self.levels}; fsq needs dim={self.dim} levels above 1 "
                f"with product size={self.size}",
            )


@dataclass(frozen=True, kw_only=True)
class Patched:
    """Pictures cut into square patches; padded at the bottom and right to whole ones."""

    height_px: int = 64
    width_px: int = 64
    patch: int = 4
    """Side of a patch in pixels."""

    @property
    def rows(self) -> int:
        """Patches from top to bottom."""
        return -(-self.height_px // self.patch)

    @property
    def columns(self) -> int:
        """Patches from left to right."""
        return -(-self.width_px // self.patch)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Patched):
    """Video <-> tokens (paper, section 2.1)."""

    frames: int = 16
    """T of training windows."""
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        _positive(self, "height_px", "width_px", "patch", "frames")

    @property
    def tokens(self) -> int:
        """N, tokens per frame."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class ActionsConfig(Patched):
    """The latent action model (paper, section 2.1): a VQ-VAE between frames with a tiny codebook."""

    patch: int = 16
    """Side of a patch in pixels; larger than the tokenizer's, as only the motion matters."""
    frames: int = 16
    """T of training windows."""
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    codebook: CodebookConfig = field(default_factory=lambda: CodebookConfig(size=8, dim=32, warmup_share=0.4))
    """A codes; `size` is the number of actions."""
    residual: bool = True
    """The decoder predicts a change of the last frame, from zero; False is the paper's: the frame, by a sigmoid."""
    difference: bool = True
    """The encoder also gets the change from the frame before; False is the paper's."""
    source: Literal["pixels", "tokens"] = "pixels"
    """What it watches: pixels (the paper) or the tokenizer's tokens (the paper's ablation)."""
    vocabulary: int = 0
    """K of the tokenizer, for source tokens."""
    contrast: float = 0.0
    """Weight of an InfoNCE term between the action and the change that it explains; 0 is the paper's."""
    coarse: int = 0
    """Above 0: a two-level codebook, `coarse` groups of codebook.size / coarse codes each."""

    def __post_init__(self) -> None:
        _positive(self, "height_px", "width_px", "patch")
        _require(self.frames >= 2, f"ActionsConfig.frames is {self.frames}; an action lies between two frames")
        _one_of("ActionsConfig.source", self.source, ("pixels", "tokens"))
        _require(
            self.source == "pixels" or self.vocabulary > 0,
            "ActionsConfig.vocabulary is 0; set it to the tokenizer's codebook size with source='tokens'",
        )
        _require(
            self.coarse >= 0 and (not self.coarse or self.codebook.size % self.coarse == 0),
            f"ActionsConfig.coarse is {self.coarse}; it must divide the {self.codebook.size} actions",
        )


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig:
    """Masked prediction of the next frame's tokens (paper, section 2.1; MaskGIT, arXiv 2202.04200)."""

    rows: int = 16
    """Tokens from top to bottom."""
    columns: int = 16
    """Tokens from left to right."""
    vocabulary: int = 1024
    """K of the tokenizer."""
    actions: int = 8
    """A, actions that can be taken."""
    frames: int = 16
    """T of training windows, and the most frames that a session's cache holds."""
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    action_mode: ActionMode = "additive"
    """additive: added to every token of the frame that it leads to (the paper); prepended: one more token in that
    frame; film: scales and shifts the features before each feed-forward."""
    masking: Masking = "genie"
    """genie: one rate per sample; per_frame: one rate per frame; ctf: complete teacher forcing, a masked frame sees
    complete past frames (arXiv 2501.12389)."""
    mask_low: float = 0.5
    """Least mask rate; rates are uniform from here to 1."""
    single_share: float = 0.0
    """Share of samples in which only one frame is masked, so that its past is clean; 0 is the paper's."""
    words: int = 0
    """Words of a text about the video (its title) that stand before each frame's tokens as a prefix; 0 for none."""
    text_vocabulary: int = 4096
    """Words are hashed to so many."""
    corruption: float = 0.0
    """Most tokens (share) of the context that may be replaced by random ones; the level is told to the model."""

    def __post_init__(self) -> None:
        _positive(self, "rows", "columns", "vocabulary", "actions", "text_vocabulary")
        _require(self.words >= 0, f"DynamicsConfig.words is {self.words}; give 0 or more")
        _require(self.frames >= 2, f"DynamicsConfig.frames is {self.frames}; the second frame is the first predicted")
        _one_of("DynamicsConfig.action_mode", self.action_mode, get_args(ActionMode))
        _one_of("DynamicsConfig.masking", self.masking, get_args(Masking))
        for name in ("mask_low", "single_share", "corruption"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"DynamicsConfig.{name} is {value}; give a share in [0, 1]")

    @property
    def tokens(self) -> int:
        """N, tokens per frame."""
        return self.rows * self.columns

    @property
    def prefix(self) -> int:
        """Places before a frame's tokens inside the transformer: of words, and of a prepended action."""
        return self.words + (self.action_mode == "prepended")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Everything that defines a playable world: three models that fit together."""

    fps: float = 10.0
    """Frames per second of the footage, and of play."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    actions: ActionsConfig = field(default_factory=ActionsConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)

    def __post_init__(self) -> None:
        t, a, d = self.tokenizer, self.actions, self.dynamics
        _positive(self, "fps")
        _require(
            (d.rows, d.columns) == (t.rows, t.columns),
            f"dynamics is for {d.rows}x{d.columns} tokens, the tokenizer makes {t.rows}x{t.columns}; set them equal",
        )
        _require(
            d.vocabulary == t.codebook.size,
            f"dynamics.vocabulary is {d.vocabulary}, the tokenizer has {t.codebook.size} codes; make them equal",
        )
        _require(
            d.actions == a.codebook.size,
            f"dynamics.actions is {d.actions}, the latent action model has {a.codebook.size}; make them equal",
        )
        _require(
            a.source == "pixels" or (a.vocabulary, a.rows, a.columns) == (d.vocabulary, d.rows, d.columns),
            f"actions watches {a.rows}x{a.columns} tokens of {a.vocabulary} codes, the tokenizer makes "
            f"{t.rows}x{t.columns} of {t.codebook.size}; make patch and vocabulary equal",
        )
        _require(
            (a.height_px, a.width_px) == (t.height_px, t.width_px),
            f"actions watches {a.height_px}x{a.width_px} px, the tokenizer {t.height_px}x{t.width_px}; make them equal",
        )

    @property
    def frames(self) -> int:
        """T, frames of a training window and of a session's memory."""
        return self.dynamics.frames


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How the tokens of a frame are drawn (paper, section 2.2: 25 steps, temperature 2, random sampling)."""

    steps: int = 25
    """Refinement passes per frame."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 for all."""
    order: Order = "confidence"
    """Which tokens are revealed first: the surest, random ones, or a Halton sequence (static, evenly spread)."""
    order_noise: float = 1.0
    """Noise on the confidence, fading out over the steps (MaskGIT's choice temperature)."""
    policy: Policy = "epoch"
    """Memory past T frames. epoch: drop the older half and start again from the rest (exact: positions as in training);
    reprefill: recompute the last T-1 frames each frame (exact); rolling: keep the last W frames of K/V (exact for a
    model trained with a sliding window W below T)."""

    def __post_init__(self) -> None:
        _positive(self, "steps")
        _require(self.temperature >= 0, f"SamplerConfig.temperature is {self.temperature}; give 0 or more")
        _require(self.top_k >= 0, f"SamplerConfig.top_k is {self.top_k}; give 0 (all tokens) or more")
        _one_of("SamplerConfig.order", self.order, get_args(Order))
        _one_of("SamplerConfig.policy", self.policy, get_args(Policy))


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(Patched):
    """A player that learned by watching (paper, appendix E): its size of picture and its actions are those of the
    latent action model that says what was done."""

    frames: int = 4
    """T, the newest frames, which it decides by."""
    actions: int = 8
    """A, latent actions."""
    transformer: TransformerConfig = field(
        default_factory=lambda: TransformerConfig(layers=12, width=512, heads=8, head_size=64, window=4)
    )

    def __post_init__(self) -> None:
        _positive(self, "height_px", "width_px", "patch", "frames", "actions")


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """The classifier of clips: a ResNet-18 on thumbnails (paper, section 3.1), 11 M parameters at its default width."""

    frames: int = 8
    """Thumbnails of a clip, evenly spread over it."""
    height_px: int = 54
    """Height of a thumbnail."""
    width_px: int = 96
    """Width of a thumbnail; clips of another shape are stretched."""
    width: int = 64
    """Features of the first of four stages; each of the others has twice as many as the one before."""
    groups: int = 8
    """Groups that features are normalised in, a divisor of the width."""

    def __post_init__(self) -> None:
        _positive(self, "frames", "width", "groups")
        _require(min(self.height_px, self.width_px) >= 16, "QualityConfig: thumbnails need at least 16x16 px")
        _require(self.width % self.groups == 0, f"QualityConfig.width is {self.width}; make it a multiple of groups")


def config_to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain JSON-ready values."""
    return {
        f.name: config_to_dict(v)
        if is_dataclass(v := getattr(config, f.name))
        else list(v)
        if isinstance(v, tuple)
        else v
        for f in fields(config)
    }


def config_from_dict(cls: type[T], values: Mapping[str, Any], where: str = "config") -> T:
    """Rebuild settings from `config_to_dict`'s values.

    Raises:
        ModelError: a key is unknown, or a value is refused by the dataclass.
    """
    known = {f.name: f for f in fields(cls)}  # pyrefly: ignore
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise ModelError(f"{where} has no setting {name!r}{hint}")
        kind = known[name].type
        if isinstance(value, Mapping) and isinstance(kind, type):
            value = config_from_dict(kind, value, f"{where}.{name}")
        settings[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**settings)
    except TypeError as error:
        raise ModelError(f"{where} does not fit {cls.__name__}: {error}") from error
