"""First frames from words: an optional text-to-image model that gateways ask (`lampworks serve --text MODEL`)."""

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from infra.config import UserError
from serving.config import ServeConfig
from serving.protocol import Problem

if TYPE_CHECKING:
    from torch import Generator

MAX_TEXT = 500
"""Longest description, in characters; a text encoder reads 77 tokens of it."""


class Painting(Protocol):
    """Who makes a picture from words: in this process, or a deployment."""

    async def paint(self, text: str, seed: int) -> np.ndarray:
        """The picture, uint8 (H, W, 3), that a text and a seed make."""
        ...


class Painter:
    """A diffusers pipeline; a deployment of its own. Weights come as safetensors only, and never bring code.

    Raises:
        UserError: diffusers is not installed, or there is no such pipeline.
    """

    def __init__(self, config: ServeConfig) -> None:
        try:
            from diffusers import AutoPipelineForText2Image  # an extra: most servers have no text prompts
        except ImportError as error:
            raise UserError("--text needs diffusers: pip install 'lampworks[text]'") from error
        import torch

        torch.set_num_threads(config.threads)
        kind = torch.float16 if config.device == "cuda" else torch.float32
        try:
            pipeline: Any = AutoPipelineForText2Image.from_pretrained(
                config.text, torch_dtype=kind, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--text {config.text}: no text-to-image pipeline there ({error})") from error
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline, self._config = pipeline.to(config.device), config
        self._turn = asyncio.Lock()

    async def paint(self, text: str, seed: int) -> np.ndarray:
        """The picture, uint8 (H, W, 3), that a text and a seed make; one after another."""
        async with self._turn:
            return await asyncio.to_thread(self._paint, text, seed)

    def _paint(self, text: str, seed: int) -> np.ndarray:
        import torch

        drawn: Generator = torch.Generator("cpu").manual_seed(seed)
        made = self._pipeline(
            text,
            num_inference_steps=self._config.text_steps,
            guidance_scale=self._config.text_guidance,
            generator=drawn,
            output_type="np",
        )
        return (np.clip(made.images[0], 0, 1) * 255).round().astype(np.uint8)


class RemotePainter:
    """The `Painter` deployment, as a gateway sees it."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def paint(self, text: str, seed: int) -> np.ndarray:
        """See `Painter.paint`.

        Raises:
            Problem: 503 no replica, 429 too many are waiting.
        """
        try:
            return await self._handle.paint.remote(text, seed)
        except BackPressureError as error:
            raise Problem(
                429, "painter-busy", "too many pictures are being painted: wait a little", retry_after_s=10
            ) from error
        except (RayActorError, DeploymentUnavailableError) as error:
            raise Problem(
                503, "painter-unavailable", "the text-to-image model is being restarted", retry_after_s=10
            ) from error


def check_text(text: str) -> str:
    """The description without what surrounds it.

    Raises:
        Problem: 422 empty, or too long.
    """
    if not 0 < len(text.strip()) <= MAX_TEXT:
        raise Problem(
            422, "bad-text", f"a description of {len(text.strip())} characters: give 1 to {MAX_TEXT}", limit=MAX_TEXT
        )
    return text.strip()
