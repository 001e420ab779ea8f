"""Which steps are left out of a training, and which batches it goes around after a restart."""

import json
import math
import statistics
from pathlib import Path

SKIPPED = "skipped.json"
SPAN, FEWEST = 64, 16


class Watch:
    """Finds steps whose loss or gradients are out of the ordinary: far above the median of the last steps.

    Args:
        factor: how many times the median is too much; 0 lets everything pass.

    Attributes:
        seen: the last values of the steps that were taken, at most `SPAN` of each; a restart takes them up.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.seen: dict[str, list[float]] = {"loss": [], "norm": []}

    def limit(self, name: str) -> float:
        """What a value may be at most; infinite until `FEWEST` are known."""
        known = self.seen[name]
        return self.factor * statistics.median(known) if self.factor and len(known) >= FEWEST else math.inf

    def add(self, loss: float, norm: float) -> None:
        """A step that was taken."""
        if self.factor:
            for name, value in (("loss", loss), ("norm", norm)):
                self.seen[name] = [*self.seen[name][1 - SPAN :], value]

    def reason(self, loss: float, norm: float) -> str:
        """Why a step is left out."""
        if not math.isfinite(norm):
            return "was not finite"
        name, value = ("loss", loss) if loss > self.limit("loss") else ("norm", norm)
        kind = {"loss": "loss", "norm": "gradient norm"}[name]
        return (
            f"spiked ({kind} {value:.3g}, the median of the steps before is {statistics.median(self.seen[name]):.3g})"
        )


def read_skipped(folder: Path) -> list[int]:
    """Numbers of the batches that a training goes around."""
    path = folder / SKIPPED
    return json.loads(path.read_text()) if path.exists() else []


def write_skipped(folder: Path, numbers: list[int]) -> None:
    """Atomically."""
    draft = folder / f".{SKIPPED}"
    draft.write_text(json.dumps(sorted(set(numbers))))
    draft.replace(folder / SKIPPED)
