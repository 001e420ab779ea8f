"""The latent action model: what happened between two frames, as one of a few codes, without labels (paper, 2.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.config import ActionsConfig, ModelError
from models.quantizer import Codebook, Quantized
from models.tokenizer import check_frames, patchify
from models.transformer import Places, Transformer


class LatentActionModel(nn.Module):
    """Frames uint8 (B, T, H, W, C) -> actions int64 (B, T-1); action t leads from frame t to frame t+1."""

    def __init__(self, cfg: ActionsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        pixels = cfg.patch**2 * 3
        self.embed = nn.Linear(pixels * (2 if cfg.difference else 1), cfg.encoder.width)
        self.encoder_places = Places(cfg.rows, cfg.columns, cfg.encoder.width)
        self.encoder = Transformer(cfg.encoder)
        self.project = nn.Linear(2 * cfg.encoder.width, cfg.codebook.dim)
        self.codebook = Codebook(cfg.codebook)
        self.expand = nn.Linear(cfg.codebook.dim, cfg.decoder.width)
        self.decoder_embed = nn.Linear(pixels, cfg.decoder.width)
        self.decoder_places = Places(cfg.rows, cfg.columns, cfg.decoder.width)
        self.decoder = Transformer(cfg.decoder)
        self.head = nn.Linear(cfg.decoder.width, pixels)
        if cfg.residual:
            nn.init.zeros_(self.head.weight)

    def begin_step(self, step: int, total_steps: int) -> None:
        """Say where training stands, before the step's forwards."""
        self.codebook.begin_step(step, total_steps)

    def end_step(self) -> None:
        """Update the codebook, after the optimizer's step."""
        self.codebook.end_step()

    def encodings(self, patches_BTNP: Tensor) -> Tensor:
        """Patches in [0, 1] -> one encoding per pair of frames (B, T-1, dim), before quantization."""
        x = 2 * patches_BTNP.to(self.embed.weight.dtype) - 1
        if self.cfg.difference:
            x = torch.cat((x, F.pad(x[:, 1:] - x[:, :-1], (0, 0, 0, 0, 1, 0))), dim=-1)
        pooled = self.encoder(self.embed(x) + self.encoder_places()).mean(dim=2)
        return self.project(torch.cat((pooled[:, :-1], pooled[:, 1:]), dim=-1))

    def predict(self, patches_BTNP: Tensor, vectors_BTd: Tensor) -> Tensor:
        """History (B, T-1, N, P) and actions' vectors (B, T-1, dim) -> the next frames' patches (B, T-1, N, P)."""
        x = self.decoder_embed(2 * patches_BTNP.to(self.embed.weight.dtype) - 1)
        x = x + self.decoder_places() + self.expand(vectors_BTd)[:, :, None]
        y = self.head(self.decoder(x)).to(patches_BTNP.dtype)
        return patches_BTNP + y if self.cfg.residual else y.sigmoid()

    def quantized(self, batch: dict[str, Tensor]) -> tuple[Quantized, Tensor]:
        """Actions of a batch and its patches (B, T, N, P)."""
        check_frames(batch["frames"], self.cfg.height_px, self.cfg.width_px, "the latent action model")
        patches = patchify(batch["frames"], self.cfg.patch)
        return self.codebook(self.encodings(patches), batch.get("key")), patches

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Prediction and codebook loss of batch["frames"] uint8 (B, T, H, W, C), batch["key"] (B,)."""
        actions, patches = self.quantized(batch)
        return self.loss(actions, patches)

    def loss(self, actions: Quantized, patches: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Error of the predicted next frames in units of the error of copying the last, and the codebook's loss."""
        error = F.mse_loss(self.predict(patches[:, :-1], actions.vectors), patches[:, 1:])
        copying = F.mse_loss(patches[:, :-1], patches[:, 1:]).detach()
        loss = error / (copying + 1e-4) + actions.loss
        metrics = {
            "loss": loss,
            "mse": error,
            "gain_db": 10 * ((copying + 1e-10) / (error + 1e-10)).log10(),
            "codebook_loss": actions.loss,
        }
        metrics |= self.codebook.metrics(actions.codes)
        return loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def infer(self, frames_BTHWC: Tensor) -> Tensor:
        """Frames uint8 (B, T, H, W, C) -> actions int64 (B, T-1).

        Raises:
            ModelError: frames are not uint8 of this model's size, or fewer than two.
        """
        if frames_BTHWC.ndim == 5 and frames_BTHWC.shape[1] < 2:
            raise ModelError(f"got {frames_BTHWC.shape[1]} frame; an action lies between two frames, give at least 2")
        training = self.codebook.training
        self.codebook.training = False
        actions, _ = self.quantized({"frames": frames_BTHWC})
        self.codebook.training = training
        return actions.codes
