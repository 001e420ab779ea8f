"""The latent action model: what happened between two frames, as one of a few codes, without labels (paper, 2.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.config import ActionsConfig, ModelError
from models.quantizer import Codebook, Quantized, TwoLevels
from models.tokenizer import check_frames, patchify
from models.transformer import Places, Transformer

_SHARPNESS = 10.0  # of the InfoNCE term's similarities


class LatentActionModel(nn.Module):
    """Frames uint8 (B, T, H, W, C) -> actions int64 (B, T-1); action t leads from frame t to frame t+1.

    "Observed" below are patches (B, T, N, P) in [0, 1], or tokens int64 (B, T, N) where the source is tokens.
    """

    def __init__(self, cfg: ActionsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        pixels = cfg.patch**2 * 3
        if cfg.source == "tokens":
            seen = [nn.Embedding(cfg.vocabulary, cfg.encoder.width) for _ in range(1 + cfg.difference)]
            self.embed, self.decoder_embed = nn.ModuleList(seen), nn.Embedding(cfg.vocabulary, cfg.decoder.width)
        else:
            self.embed = nn.Linear(pixels * (1 + cfg.difference), cfg.encoder.width)
            self.decoder_embed = nn.Linear(pixels, cfg.decoder.width)
        self.encoder_places = Places(cfg.rows, cfg.columns, cfg.encoder.width)
        self.encoder = Transformer(cfg.encoder)
        self.project = nn.Linear(2 * cfg.encoder.width, cfg.codebook.dim)
        self.codebook = TwoLevels(cfg.codebook, cfg.coarse) if cfg.coarse else Codebook(cfg.codebook)
        self.expand = nn.Linear(cfg.codebook.dim, cfg.decoder.width)
        self.decoder_places = Places(cfg.rows, cfg.columns, cfg.decoder.width)
        self.decoder = Transformer(cfg.decoder)
        self.head = nn.Linear(cfg.decoder.width, cfg.vocabulary if cfg.source == "tokens" else pixels)
        if cfg.residual and cfg.source == "pixels":
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        self.change = nn.Linear(2 * cfg.encoder.width, cfg.codebook.dim) if cfg.contrast > 0 else None

    def begin_step(self, step: int, total_steps: int) -> None:
        """Say where training stands, before the step's forwards."""
        self.codebook.begin_step(step, total_steps)

    def end_step(self) -> None:
        """Update the codebook, after the optimizer's step."""
        self.codebook.end_step()

    def observe(self, batch: dict[str, Tensor]) -> Tensor:
        """What this model watches in a batch: its frames as patches, or its tokens."""
        if self.cfg.source == "tokens":
            return batch["tokens"].long()
        check_frames(batch["frames"], self.cfg.height_px, self.cfg.width_px, "the latent action model")
        return patchify(batch["frames"], self.cfg.patch)

    def encodings(self, observed: Tensor) -> Tensor:
        """One encoding per pair of frames (B, T-1, dim), before quantization, from the observed frames."""
        pooled = self.encoder(self._enter(observed) + self.encoder_places()).mean(dim=2)
        return self.project(torch.cat((pooled[:, :-1], pooled[:, 1:]), dim=-1))

    def _enter(self, observed: Tensor) -> Tensor:
        if isinstance(self.embed, nn.ModuleList):
            before = torch.cat((observed[:, :1], observed[:, :-1]), dim=1)
            return sum((table(z) for table, z in zip(self.embed, (observed, before), strict=False)), torch.zeros(()))
        x = 2 * observed.to(self.embed.weight.dtype) - 1
        if self.cfg.difference:
            x = torch.cat((x, F.pad(x[:, 1:] - x[:, :-1], (0, 0, 0, 0, 1, 0))), dim=-1)
        return self.embed(x)

    def predict(self, history: Tensor, vectors_BTd: Tensor) -> Tensor:
        """Observed history (T-1 frames) and the actions' vectors (B, T-1, dim) -> the next frames.

        Patches (B, T-1, N, P), or with tokens their logits (B, T-1, N, K).
        """
        tokens = self.cfg.source == "tokens"
        x = self.decoder_embed(history if tokens else 2 * history.to(self.expand.weight.dtype) - 1)
        x = x + self.decoder_places() + self.expand(vectors_BTd)[:, :, None]
        y = self.head(self.decoder(x))
        if tokens:
            return y
        return history + y.to(history.dtype) if self.cfg.residual else y.sigmoid().to(history.dtype)

    def quantized(self, batch: dict[str, Tensor]) -> tuple[Quantized, Tensor]:
        """Actions of a batch, and what was observed."""
        observed = self.observe(batch)
        return self.codebook(self.encodings(observed), batch.get("key")), observed

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Prediction and codebook loss of batch["frames"] uint8 (B, T, H, W, C), or of batch["tokens"]."""
        actions, observed = self.quantized(batch)
        return self.loss(actions, observed)

    def loss(self, actions: Quantized, observed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Error of the predicted next frames, the codebook's loss, and the InfoNCE term if it has weight.

        For pixels the error is in units of that of copying the last frame; for tokens it is a cross-entropy.
        """
        predicted = self.predict(observed[:, :-1], actions.vectors)
        if self.cfg.source == "tokens":
            error = F.cross_entropy(predicted.flatten(0, 2).float(), observed[:, 1:].flatten())
            loss, metrics = error + actions.loss, {"cross_entropy": error}
        else:
            error = F.mse_loss(predicted, observed[:, 1:])
            copying = F.mse_loss(observed[:, :-1], observed[:, 1:]).detach()
            loss = error / (copying + 1e-4) + actions.loss
            metrics = {"mse": error, "gain_db": 10 * ((copying + 1e-10) / (error + 1e-10)).log10()}
        if self.change is not None:
            metrics["contrast"] = self._contrast(actions.vectors, observed)
            loss = loss + self.cfg.contrast * metrics["contrast"]
        metrics |= {"loss": loss, "codebook_loss": actions.loss} | self.codebook.metrics(actions.codes)
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _contrast(self, vectors_BTd: Tensor, observed: Tensor) -> Tensor:
        """InfoNCE (arXiv 1807.03748): each action must tell its own change from the other changes of the batch."""
        assert self.change is not None
        now = self._enter(observed)
        change = torch.cat((now[:, 1:] - now[:, :-1], (now[:, 1:] - now[:, :-1]).abs()), dim=-1).mean(dim=2)
        a, b = (F.normalize(t.flatten(0, 1).float(), dim=-1) for t in (vectors_BTd, self.change(change)))
        return F.cross_entropy(_SHARPNESS * a @ b.T, torch.arange(len(a), device=a.device))

    @torch.no_grad()
    def infer(self, frames_BTHWC: Tensor, tokens_BTN: Tensor | None = None) -> Tensor:
        """Frames uint8 (B, T, H, W, C) -> actions int64 (B, T-1); a model that watches tokens needs those, too.

        Raises:
            ModelError: frames are not uint8 of this model's size, or fewer than two.
        """
        if frames_BTHWC.ndim == 5 and frames_BTHWC.shape[1] < 2:
            raise ModelError(f"got {frames_BTHWC.shape[1]} frame; an action lies between two frames, give at least 2")
        batch = {"frames": frames_BTHWC}
        if self.cfg.source == "tokens":
            if tokens_BTN is None:
                raise ModelError("this latent action model watches tokens; give the frames' tokens, too")
            batch["tokens"] = tokens_BTN
        return self.codebook.nearest(self.encodings(self.observe(batch)))
