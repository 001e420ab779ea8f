"""The video tokenizer: a VQ-VAE with space-time transformers that turns frames into tokens and back (paper, 2.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.attention import Cache, Clock
from models.config import ModelError, TokenizerConfig
from models.quantizer import Codebook
from models.transformer import Places, Transformer


def check_frames(frames: Tensor, height_px: int, width_px: int, where: str) -> None:
    """Raise ModelError unless frames are uint8 (B, T, height, width, 3)."""
    if frames.dtype != torch.uint8:
        raise ModelError(f"{where} got frames of {frames.dtype}; give uint8 in 0..255")
    if frames.ndim != 5 or tuple(frames.shape[2:]) != (height_px, width_px, 3):
        raise ModelError(
            f"{where} got frames of shape {tuple(frames.shape)}; give (B, T, {height_px}, {width_px}, 3), "
            "resized to this world's size"
        )


def patchify(frames_BTHWC: Tensor, patch: int) -> Tensor:
    """uint8 frames -> patches (B, T, N, patch*patch*3) in [0, 1]; edges are repeated to whole patches."""
    B, T, H, W, C = frames_BTHWC.shape
    x = frames_BTHWC
    below, right = -H % patch, -W % patch
    if below:
        x = torch.cat((x, x[:, :, -1:].expand(B, T, below, W, C)), dim=2)
    if right:
        x = torch.cat((x, x[:, :, :, -1:].expand(B, T, H + below, right, C)), dim=3)
    x = x.reshape(B, T, (H + below) // patch, patch, (W + right) // patch, patch * C)
    dtype = torch.get_default_dtype()
    return x.transpose(3, 4).reshape(B, T, -1, patch * patch * C).to(dtype) / 255


def unpatchify(x_BTNP: Tensor, patch: int, height_px: int, width_px: int) -> Tensor:
    """Patches -> frames (B, T, H, W, C) of the same dtype, cut to size."""
    B, T, _, P = x_BTNP.shape
    rows, columns = -(-height_px // patch), -(-width_px // patch)
    x = x_BTNP.reshape(B, T, rows, columns, patch, P // patch).transpose(3, 4)
    return x.reshape(B, T, rows * patch, columns * patch, -1)[:, :, :height_px, :width_px]


def to_uint8(x: Tensor) -> Tensor:
    """Values in [0, 1] -> uint8, rounded."""
    return (x.float().clamp(0, 1) * 255).round().to(torch.uint8)


class Tokenizer(nn.Module):
    """Frames uint8 (B, T, H, W, C) <-> tokens int64 (B, T, N)."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        pixels = cfg.patch**2 * 3
        self.embed = nn.Linear(pixels, cfg.encoder.width)
        self.encoder_places = (
            Places(cfg.rows, cfg.columns, cfg.encoder.width) if cfg.encoder.attention != "none" else None
        )
        self.encoder = Transformer(cfg.encoder)
        self.project = nn.Linear(cfg.encoder.width, cfg.codebook.dim)
        self.codebook = Codebook(cfg.codebook)
        self.expand = nn.Linear(cfg.codebook.dim, cfg.decoder.width)
        self.decoder_places = (
            Places(cfg.rows, cfg.columns, cfg.decoder.width) if cfg.decoder.attention != "none" else None
        )
        self.decoder = Transformer(cfg.decoder)
        self.head = nn.Linear(cfg.decoder.width, pixels)

    def begin_step(self, step: int, total_steps: int) -> None:
        """Say where training stands, before the step's forwards."""
        self.codebook.begin_step(step, total_steps)

    def end_step(self) -> None:
        """Update the codebook, after the optimizer's step."""
        self.codebook.end_step()

    def features(self, patches_BTNP: Tensor) -> Tensor:
        """Patches in [0, 1] -> encodings (B, T, N, dim) before quantization."""
        x = self.embed(2 * patches_BTNP.to(self.embed.weight.dtype) - 1)
        if self.encoder_places is not None:
            x = x + self.encoder_places()
        return self.project(self.encoder(x))

    def pixels(self, vectors_BTNd: Tensor) -> Tensor:
        """Code vectors -> patches (B, T, N, patch*patch*3), nominally in [0, 1]."""
        return self.head(self.decoder(self._enter_decoder(vectors_BTNd))) + 0.5

    def _enter_decoder(self, vectors: Tensor) -> Tensor:
        x = self.expand(vectors.to(self.expand.weight.dtype))
        return x if self.decoder_places is None else x + self.decoder_places()

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction and codebook loss of batch["frames"] uint8 (B, T, H, W, C), batch["key"] (B,)."""
        check_frames(batch["frames"], self.cfg.height_px, self.cfg.width_px, "the tokenizer")
        patches = patchify(batch["frames"], self.cfg.patch)
        quantized = self.codebook(self.features(patches), batch.get("key"))
        error = F.mse_loss(self.pixels(quantized.vectors).to(patches.dtype), patches)
        # pixels vary by about 0.05 around their mean; in units of that the two losses weigh alike
        loss = error / 0.05 + quantized.loss
        metrics = {
            "loss": loss,
            "mse": error,
            "psnr": -10 * error.clamp_min(1e-10).log10(),
            "codebook_loss": quantized.loss,
        }
        metrics |= self.codebook.metrics(quantized.codes)
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def encode(self, frames_BTHWC: Tensor) -> Tensor:
        """Frames uint8 -> tokens int64 (B, T, N). Frame t's tokens depend on frames <= t only.

        Raises:
            ModelError: frames are not uint8 of this tokenizer's size.
        """
        check_frames(frames_BTHWC, self.cfg.height_px, self.cfg.width_px, "the tokenizer")
        return self.codebook.nearest(self.features(patchify(frames_BTHWC, self.cfg.patch)))

    @torch.no_grad()
    def decode(self, tokens_BTN: Tensor) -> Tensor:
        """Tokens int64 (B, T, N) -> frames uint8 (B, T, H, W, C). Frame t depends on tokens of frames <= t only.

        Raises:
            ModelError: a token is no code of this tokenizer, or there are not N per frame.
        """
        self.check_tokens(tokens_BTN)
        x = self.pixels(self.codebook.lookup(tokens_BTN))
        return to_uint8(unpatchify(x, self.cfg.patch, self.cfg.height_px, self.cfg.width_px))

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise ModelError unless tokens (..., N) are codes of this tokenizer."""
        if tokens.shape[-1] != self.cfg.tokens:
            raise ModelError(f"got {tokens.shape[-1]} tokens per frame; this tokenizer makes {self.cfg.tokens}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.cfg.codebook.size:
            raise ModelError(
                f"tokens range over {int(tokens.min())}..{int(tokens.max())}; "
                f"this tokenizer has codes 0..{self.cfg.codebook.size - 1}"
            )

    def decoder_step(self, tokens_SN: Tensor, caches: list[Cache | None], clock: Clock) -> Tensor:
        """Tokens of one new frame per slot -> its frame uint8 (S, H, W, C), given the cached frames before it."""
        x = self._enter_decoder(self.codebook.lookup(tokens_SN))
        x = self.head(self.decoder.finish(self.decoder.step(x, None, caches, clock), None)) + 0.5
        return to_uint8(unpatchify(x[:, None], self.cfg.patch, self.cfg.height_px, self.cfg.width_px))[:, 0]

    def encoder_step(self, frames_SHWC: Tensor, caches: list[Cache | None], clock: Clock) -> Tensor:
        """One new frame uint8 per slot -> its tokens int64 (S, N), given the cached frames before it."""
        x = self.embed(2 * patchify(frames_SHWC[:, None], self.cfg.patch)[:, 0].to(self.embed.weight.dtype) - 1)
        if self.encoder_places is not None:
            x = x + self.encoder_places()
        x = self.encoder.finish(self.encoder.step(x, None, caches, clock), None)
        return self.codebook.nearest(self.project(x))
