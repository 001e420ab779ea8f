"""What a user may set in a scaling study. Field docstrings are the command line's help."""

import re
from dataclasses import dataclass, field, replace

from infra.config import UserError, within
from models.config import TransformerConfig, WorldConfig
from pipelines.train_config import OptimizerConfig, TrainConfig

_PARTS = {
    "tokenizer": ("tokenizer.encoder", "tokenizer.decoder"),
    "actions": ("actions.encoder", "actions.decoder"),
    "dynamics": ("dynamics.transformer",),
    "world": ("dynamics.transformer",),
}
"""Stage -> the transformers that a size sets. In co-training the dynamics grow and the latent action model stays."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Trains one stage at several sizes and batch sizes, fits a power law, and says what a budget is best spent on.

    Every trial is a training of its own: the same command again continues those that stopped and finds the others done.
    """

    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            workers=0, steps=1000, picture_every=0, optimizer=OptimizerConfig(schedule="constant")
        )
    )
    """What each trial is, apart from its size and batch."""
    sizes: tuple[str, ...] = ("64x4", "96x6", "128x8")
    """Widths and layers of the stage's transformers, such as 64x4; the number of heads stays."""
    batches: tuple[int, ...] = (16, 32)
    """Windows of a step."""
    budget_flops: float = 1e15
    """Operations that the choice is made for."""
    at_once: int = 1
    """Trials that run side by side."""

    def __post_init__(self) -> None:
        within("--budget-flops", self.budget_flops, 1, 1e30)
        within("--at-once", self.at_once, 1, 10_000)
        if self.train.stage not in _PARTS:
            raise UserError(f"--train.stage is {self.train.stage!r}: a sweep takes one of {', '.join(_PARTS)}")
        if self.train.optimizer.schedule != "constant":
            raise UserError(
                "a sweep reads each point of a loss curve as a training of that length, which a falling rate forbids: "
                "set --train.optimizer.schedule constant"
            )
        if len(set(self.sizes)) < 2:
            raise UserError(f"--sizes names {len(set(self.sizes))}: a law needs at least two, better three")
        if not self.batches:
            raise UserError("--batches is empty: name at least one")
        for size in self.sizes:
            for batch in self.batches:
                self.trial(size, batch)

    def trial(self, size: str, batch: int) -> TrainConfig:
        """The training of one size and batch.

        Raises:
            UserError: the size is not written as 64x4, its heads do not divide it, the workers not the batch.
        """
        base = self.train
        model = base.model
        for part in _PARTS[base.stage]:
            model = _resized(model, part, size)
        micro = max(1, min(base.micro_batch, batch // max(1, base.workers)))
        name = f"{base.artifact_name}-{size}-b{batch}"
        return replace(base, model=model, name=name, batch=batch, micro_batch=micro)


def _resized(model: WorldConfig, part: str, size: str) -> WorldConfig:
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if not found:
        raise UserError(f"--sizes has {size!r}: write width x layers, such as 64x4")
    owner, name = part.split(".")
    settings = getattr(model, owner)
    shape: TransformerConfig = getattr(settings, name)
    width, layers = int(found[1]), int(found[2])
    if width % (2 * shape.heads):
        unit = 2 * shape.heads
        raise UserError(f"--sizes has {size!r}: {shape.heads} heads need a width that is a multiple of {unit}")
    shape = replace(shape, width=width, layers=layers, head_size=width // shape.heads)
    return replace(model, **{owner: replace(settings, **{name: shape})})
