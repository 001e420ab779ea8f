"""Fewer refinement steps: a student that is taught what its teacher draws in many.

Drawing in few steps changes the distribution: `lampworks evaluate --steps` draws the curve.
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

from models.attention import Clock
from models.config import ModelError
from models.dynamics import Dynamics
from models.maskgit import draw, halton_order, reveal_counts
from models.noise import uniform, uniform_for

_STAGE, _ORDER, _DRAW = 31, 32, 33  # streams of random draws


class Distillation(nn.Module):
    """Teaches `student` to fill a frame in `steps` passes as `teacher` fills it in `teacher_steps`.

    Each sample stands at a random stage of the student's schedule: the teacher draws the last frame in many steps, in
    an order fixed by the sample's key; tokens up to that stage are shown to the student, and the rest are its targets.
    The student learns the teacher's joint draws, not the data. Trains like every model; only the student has gradients.
    """

    def __init__(self, teacher: Dynamics, student: Dynamics, steps: int = 2, teacher_steps: int = 25) -> None:
        super().__init__()
        if teacher.cfg.vocabulary != student.cfg.vocabulary or teacher.cfg.tokens != student.cfg.tokens:
            raise ModelError(
                f"the teacher knows {teacher.cfg.tokens} tokens of {teacher.cfg.vocabulary} codes, the student "
                f"{student.cfg.tokens} of {student.cfg.vocabulary}; start the student from the teacher"
            )
        if steps >= teacher_steps:
            raise ModelError(f"the student has {steps} steps, the teacher {teacher_steps}; give the student fewer")
        self.student, self.steps, self.teacher_steps = student, steps, teacher_steps
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list: not a part of what trains and is saved

    def begin_step(self, step: int, total_steps: int) -> None:
        """Nothing changes over training."""

    def end_step(self) -> None:
        """Nothing follows the optimizer's step."""

    def order(self, key_B: Tensor) -> Tensor:
        """Rank (B, N) of each place: a Halton sequence, shifted per sample, so that all places come early for some."""
        cfg = self.student.cfg
        rank = halton_order(cfg.rows, cfg.columns).to(key_B.device)
        shift = (uniform_for(key_B, _ORDER, 1) * cfg.tokens).long()
        return (rank + shift) % cfg.tokens

    @torch.no_grad()
    def teach(self, tokens_BTN: Tensor, actions_BT: Tensor, key_B: Tensor, text: Tensor | None = None) -> Tensor:
        """The teacher's draw of the last frame (B, N) in all its steps, given the frames before it."""
        teacher, order = self._teacher[0], self.order(key_B)
        (B, T, N), shape = tokens_BTN.shape, teacher.cfg.transformer
        caches = teacher.transformer.caches(B, teacher.tokens, T)
        begin = torch.zeros(B, dtype=torch.int64, device=key_B.device)
        actions = teacher.with_first(actions_BT)

        def features(tokens: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
            clock = Clock.at(slice(0, B), begin + t, begin, T, shape.window, shape.head_size, teacher.head.weight.dtype)
            return teacher.step(tokens, actions[:, t], caches, clock, text)

        for t in range(T - 1):
            features(tokens_BTN[:, t], t)
        current, place = torch.full_like(tokens_BTN[:, 0], teacher.mask_token), torch.arange(N, device=key_B.device)
        for step, count in enumerate(reveal_counts(N, self.teacher_steps)):
            logits = teacher.finish(*features(current, T - 1))
            token, _ = draw(logits, uniform(key_B[:, None], _DRAW, step, place), 1.0)
            current = torch.where((order < count) & (current == teacher.mask_token), token, current)
        return current

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the student at what the teacher would reveal next, for batch tokens, actions and key."""
        tokens, actions, key = batch["tokens"].long(), batch["actions"].long(), batch["key"]
        text = batch.get("text")
        target = self.teach(tokens, actions, key, text)
        counts = torch.tensor((0, *reveal_counts(target.shape[1], self.steps)[:-1]), device=key.device)
        stage = (uniform_for(key, _STAGE, 1) * self.steps).long()
        hidden = self.order(key) >= counts[stage]
        window = torch.cat((tokens[:, :-1], torch.where(hidden, self.student.mask_token, target)[:, None]), dim=1)
        logits = self.student.logits(window, actions, text=text)[:, -1:]
        return self.student.score(logits, target[:, None], hidden[:, None])
