from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.actions import LatentActionModel
from models.config import ActionsConfig, CodebookConfig, DynamicsConfig, TokenizerConfig, TransformerConfig
from models.dynamics import Dynamics
from models.tokenizer import Tokenizer
from models.world import World

FRAMES, CODES, ACTIONS = 4, 16, 3


def shape(**changes: Any) -> TransformerConfig:
    settings = {"layers": 2, "width": 16, "heads": 2, "head_size": 8, "window": FRAMES}
    return TransformerConfig(**(settings | changes))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def transformer() -> Callable[..., TransformerConfig]:
    return shape


@pytest.fixture
def make_tokenizer() -> Callable[..., Tokenizer]:
    def build(
        codebook: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
        encoder: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Tokenizer:
        codes = CodebookConfig(**({"size": CODES, "dim": 4} | (codebook or {})))
        settings = {
            "height_px": 12,
            "width_px": 12,
            "patch": 4,
            "frames": FRAMES,
            "codebook": codes,
            "encoder": shape(**(encoder or {})),
            "decoder": shape(**(decoder or {})),
        }
        return Tokenizer(TokenizerConfig(**(settings | changes)))

    return build


@pytest.fixture
def make_actions() -> Callable[..., LatentActionModel]:
    def build(codebook: dict[str, Any] | None = None, **changes: Any) -> LatentActionModel:
        codes = CodebookConfig(**({"size": ACTIONS, "dim": 4} | (codebook or {})))
        settings = {
            "height_px": 12,
            "width_px": 12,
            "patch": 4,
            "frames": FRAMES,
            "codebook": codes,
            "encoder": shape(),
            "decoder": shape(),
        }
        return LatentActionModel(ActionsConfig(**(settings | changes)))

    return build


@pytest.fixture
def make_dynamics() -> Callable[..., Dynamics]:
    def build(transformer: dict[str, Any] | None = None, **changes: Any) -> Dynamics:
        settings = {
            "rows": 3,
            "columns": 3,
            "vocabulary": CODES,
            "actions": ACTIONS,
            "frames": FRAMES,
            "transformer": shape(**(transformer or {})),
        }
        return Dynamics(DynamicsConfig(**(settings | changes)))

    return build


@pytest.fixture
def make_world(make_tokenizer, make_actions, make_dynamics) -> Callable[..., World]:
    """A world whose three models fit; weights are random but lively, so that every input matters."""

    def build(
        tokenizer: dict[str, Any] | None = None,
        dynamics: dict[str, Any] | None = None,
        actions: dict[str, Any] | None = None,
        double: bool = False,
    ) -> World:
        parts = make_tokenizer(**(tokenizer or {})), make_actions(**(actions or {})), make_dynamics(**(dynamics or {}))
        with torch.no_grad():
            for model in parts:
                for weight in model.parameters():
                    if weight.ndim > 1:
                        weight.mul_(2.0)
                if double:
                    model.double()
        return World(*parts)

    return build


@pytest.fixture
def clip() -> Callable[..., torch.Tensor]:
    """Random frames uint8 (batch, frames, 12, 12, 3)."""

    def build(batch: int = 2, frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (batch, frames, 12, 12, 3), generator=generator, dtype=torch.uint8)

    return build
