"""A policy: what would be done next, in latent actions, learned by watching (paper, section 3.4, appendix E)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.config import PolicyConfig
from models.tokenizer import check_frames, patchify
from models.transformer import Places, Transformer


class Policy(nn.Module):
    """Frames uint8 (B, T, H, W, C) -> for each of them the logits (B, T, A) of the action that follows it."""

    def __init__(self, cfg: PolicyConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.transformer.width
        self.embed = nn.Linear(cfg.patch**2 * 3, width)
        self.places = Places(cfg.rows, cfg.columns, width)
        self.transformer = Transformer(cfg.transformer)
        self.head = nn.Linear(width, cfg.actions)

    def begin_step(self, step: int, total_steps: int) -> None:
        """Nothing here depends on where training stands."""

    def end_step(self) -> None:
        """Nothing to do after the optimizer's step."""

    def logits(self, frames_BTHWC: Tensor) -> Tensor:
        """(B, T, A), from each frame and those before it.

        Raises:
            ModelError: frames are not uint8 of this model's size.
        """
        check_frames(frames_BTHWC, self.cfg.height_px, self.cfg.width_px, "the policy")
        x = 2 * patchify(frames_BTHWC, self.cfg.patch).to(self.embed.weight.dtype) - 1
        return self.head(self.transformer(self.embed(x) + self.places()).mean(dim=2)).float()

    @torch.no_grad()
    def act(self, frames_BTHWC: Tensor) -> Tensor:
        """The likeliest next action (B,) after the last frame; of longer pasts the newest T frames count."""
        return self.logits(frames_BTHWC[:, -self.cfg.frames :])[:, -1].argmax(dim=-1)

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of batch["actions"] (B, T), each of which leads on from its frame of batch["frames"] (B, T+1,
        H, W, C); the last frame only says what was done before it."""
        logits, actions = self.logits(batch["frames"][:, :-1]), batch["actions"]
        loss = F.cross_entropy(logits.flatten(0, 1), actions.flatten())
        right = (logits.argmax(dim=-1) == actions).float().mean()
        return loss, {"loss": loss.detach(), "accuracy": right}
