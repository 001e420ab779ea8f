"""The dynamics model: predicts the masked tokens of a frame from past frames and the action (paper, 2.1; MaskGIT)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.attention import Cache, Clock
from models.config import DynamicsConfig, ModelError
from models.noise import uniform_for
from models.transformer import Places, Transformer

_LEVELS = 10  # of context corruption, told to the model
_RATE, _MASK, _ONLY, _WHICH, _LEVEL, _CORRUPT, _TOKEN, _WORDLESS = range(8)  # streams of random draws
_WORDLESS_SHARE = 0.1  # of samples that train without their text, so that a world can be played without one


class Dynamics(nn.Module):
    """Tokens int64 (B, T, N) and actions (B, T-1) -> logits over the vocabulary. `mask_token` marks unknown tokens."""

    def __init__(self, cfg: DynamicsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        width = cfg.transformer.width
        self.mask_token, self.no_action = cfg.vocabulary, cfg.actions
        self.embed = nn.Embedding(cfg.vocabulary + 1, width)
        self.action_embed = nn.Embedding(cfg.actions + 1, width)
        self.level_embed = nn.Embedding(_LEVELS, width) if cfg.corruption > 0 else None
        self.word_embed = nn.Embedding(cfg.text_vocabulary + 1, width) if cfg.words else None
        self.places = Places(cfg.rows, cfg.columns, width)
        self.word_places = Places(1, cfg.words, width) if cfg.words else None
        self.transformer = Transformer(cfg.transformer, film=cfg.action_mode == "film")
        self.head = nn.Linear(width, cfg.vocabulary)
        for table in (self.embed, self.action_embed, self.level_embed, self.word_embed):
            if table is not None:
                nn.init.trunc_normal_(table.weight, std=0.5)

    def begin_step(self, step: int, total_steps: int) -> None:
        """Nothing changes over training; offered so that one loop trains every model."""

    def end_step(self) -> None:
        """Nothing follows the optimizer's step."""

    @property
    def tokens(self) -> int:
        """Tokens per frame inside the transformer: N' = N and those of the prefix."""
        return self.cfg.tokens + self.cfg.prefix

    def enter(
        self, tokens: Tensor, actions: Tensor, level: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, ..., N), actions (B, ...) that led to their frames -> features (..., N', D), FiLM condition.

        `text` are hashed words (B, words); None for none.
        """
        x = self.embed(tokens) + self.places()
        if self.level_embed is not None:
            x = x + (self.level_embed.weight[0] if level is None else self.level_embed(level)[:, None, None])
        action = self.action_embed(actions)
        if self.cfg.action_mode == "additive":
            x = x + action[..., None, :]
        elif self.cfg.action_mode == "prepended":
            x = torch.cat((action[..., None, :], x), dim=-2)
        if self.word_embed is not None and self.word_places is not None:
            text = tokens.new_full((len(tokens), self.cfg.words), self.cfg.text_vocabulary) if text is None else text
            words = (self.word_embed(text) + self.word_places()).view(len(x), *[1] * (x.ndim - 3), *text.shape[1:], -1)
            x = torch.cat((words.expand(*x.shape[:-2], -1, -1), x), dim=-2)
        return x, action if self.cfg.action_mode == "film" else None

    def with_first(self, actions_BT: Tensor) -> Tensor:
        """Actions (B, T-1) -> (B, T) with "none" leading to the first frame: action t-1 belongs to frame t."""
        return F.pad(actions_BT, (1, 0), value=self.no_action)

    def logits(
        self, tokens_BTN: Tensor, actions_BT: Tensor, level_B: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, N, K) for tokens int64 (B, T, N), some of them `mask_token`, and actions int64 (B, T-1)."""
        x, condition = self.enter(tokens_BTN, self.with_first(actions_BT), level_B, text)
        return self.head(self.transformer(x, condition)[:, :, self.cfg.prefix :])

    def step(
        self,
        tokens_SN: Tensor,
        action_S: Tensor,
        caches: list[Cache | None],
        clock: Clock,
        text: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One new frame per slot -> its unfinished features (S, N', D) given the cached frames, and FiLM's condition.

        A commit pass is done with that; `finish` makes logits of them.
        """
        x, condition = self.enter(tokens_SN, action_S, text=text)
        return self.transformer.step(x, condition, caches, clock), condition

    def finish(self, x: Tensor, condition: Tensor | None, at: Tensor | None = None) -> Tensor:
        """Features (..., N', D) of `step` -> logits (..., N, K), or those of the places `at` (R,) alone (..., R, K)."""
        x = x[..., self.cfg.prefix :, :]
        return self.head(self.transformer.finish(x if at is None else x[..., at, :], condition))

    def masked(self, key_B: Tensor, frames: int) -> Tensor:
        """Which tokens to hide, bool (B, T, N), drawn from the samples' keys; the first frame is never hidden."""
        cfg, (B, N) = self.cfg, (len(key_B), self.cfg.tokens)
        rate = uniform_for(key_B, _RATE, frames if cfg.masking == "per_frame" else 1)
        rate = cfg.mask_low + (1 - cfg.mask_low) * rate
        hidden = uniform_for(key_B, _MASK, frames, N) < rate[:, :, None]
        hidden[:, 0] = False
        if cfg.single_share > 0:
            which = 1 + (uniform_for(key_B, _WHICH, 1) * (frames - 1)).long()
            others = torch.arange(frames, device=key_B.device).expand(B, -1) != which
            alone = uniform_for(key_B, _ONLY, 1) < cfg.single_share
            hidden &= ~(others & alone)[:, :, None]
        return hidden

    def corrupted(self, tokens_BTN: Tensor, key_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """Context with some tokens replaced by random ones, and the level of that per sample (B,)."""
        if self.cfg.corruption == 0:
            return tokens_BTN, None
        amount = uniform_for(key_B, _LEVEL, 1)
        shape = tokens_BTN.shape[1:]
        wrong = uniform_for(key_B, _CORRUPT, *shape) < self.cfg.corruption * amount[:, :, None]
        random = (uniform_for(key_B, _TOKEN, *shape) * self.cfg.vocabulary).long()
        return torch.where(wrong, random, tokens_BTN), (amount[:, 0] * _LEVELS).long()

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy at hidden tokens of batch["tokens"] (B, T, N), given batch["actions"] (B, T-1), batch["key"].

        The targets are the original tokens, whatever was hidden or corrupted.

        Raises:
            ModelError: shapes do not fit, or a token or action is out of range.
        """
        target, actions, key = batch["tokens"].long(), batch["actions"].long(), batch["key"]
        self._check(target, actions)
        hidden = self.masked(key, target.shape[1])
        context, level = self.corrupted(target, key)
        guess = torch.where(hidden, self.mask_token, context)
        text = self._text(batch)
        if self.cfg.masking == "ctf":
            logits = self._two_streams(context, guess, actions, level, text)
        else:
            logits = self.logits(guess, actions, level, text)[:, 1:]
        return self.score(logits, target[:, 1:], hidden[:, 1:])

    def score(self, logits: Tensor, target: Tensor, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over hidden places, and metrics; logits (B, T, N, K), target and hidden (B, T, N)."""
        each = F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), reduction="none")
        weight = hidden.flatten().to(each.dtype)
        total = weight.sum().clamp_min(1)
        loss = (each * weight).sum() / total
        right = ((logits.argmax(-1) == target).flatten() * weight).sum() / total
        return loss, {"loss": loss.detach(), "accuracy": right.detach(), "masked": weight.mean()}

    def _two_streams(
        self, context: Tensor, guess: Tensor, actions: Tensor, level: Tensor | None, text: Tensor | None
    ) -> Tensor:
        """Complete teacher forcing: each masked frame sees complete past frames, as in generation (B, T-1, N, K)."""
        action = self.with_first(actions)
        x, condition = self.enter(torch.cat((context, guess), 1), torch.cat((action, action), 1), level, text)
        y = self.transformer(x, condition, two_streams=True)
        return self.head(y[:, context.shape[1] + 1 :, self.cfg.prefix :])

    def _text(self, batch: dict[str, Tensor]) -> Tensor | None:
        """Hashed words (B, words) of a batch; for some samples "no word"."""
        if not self.cfg.words or "text" not in batch:
            return None
        wordless = uniform_for(batch["key"], _WORDLESS, 1) < _WORDLESS_SHARE
        return torch.where(wordless, self.cfg.text_vocabulary, batch["text"].long())

    def _check(self, tokens: Tensor, actions: Tensor) -> None:
        if (
            tokens.ndim != 3
            or tokens.shape[2] != self.cfg.tokens
            or actions.shape != (len(tokens), tokens.shape[1] - 1)
        ):
            raise ModelError(
                f"dynamics got tokens {tuple(tokens.shape)} and actions {tuple(actions.shape)}; "
                f"give (B, T, {self.cfg.tokens}) and (B, T-1)"
            )
        for name, values, limit in (("tokens", tokens, self.cfg.vocabulary), ("actions", actions, self.cfg.actions)):
            if (
                values.device.type == "cpu"
                and values.numel()
                and not 0 <= int(values.min()) <= int(values.max()) < limit
            ):
                raise ModelError(
                    f"dynamics got {name} in {int(values.min())}..{int(values.max())}; this model knows 0..{limit - 1}"
                )
