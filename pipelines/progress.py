"""The driver's view of a training: its journal becomes lines on the console and records in MLflow."""

import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.plan import TrainingPlan
from infra.tracking import Run
from pipelines.figures import Line, line_chart

log = logging.getLogger(__name__)

PROGRESS = "progress.jsonl"
CURVES = ("loss", "actions/loss", "dynamics/loss")


class Follower:
    """Reads the journal as it grows, whoever writes it.

    Args:
        folder: of the training.
        run: where it is tracked.
        plan: what a step costs.
        peak_flops: of one worker by its data sheet; None takes what each start measures (`models.cost.ceiling_flops`).

    Attributes:
        step: the newest step told of.
        final: the newest value of every metric.
    """

    def __init__(self, folder: Path, run: Run, plan: TrainingPlan, peak_flops: float | None = None) -> None:
        self.path, self.run, self.plan, self.peak_flops = folder / PROGRESS, run, plan, peak_flops
        self.step, self.final = 0, dict[str, float]()
        self._place = 0
        self._curves: dict[str, dict[int, float]] = {}
        self._mark = folder / "followed"
        self._old = int(self._mark.read_text()) if self._mark.exists() else 0

    def follow(self) -> None:
        """Takes up the new lines. Those that an earlier driver took up are only read for the curves."""
        for fields, old in self._lines():
            if "step" in fields:
                self._metrics(fields, old)
            elif "looked" in fields:
                step = fields.pop("looked")
                self.final |= (values := {name: float(v) for name, v in fields.items() if name != "time_s"})
                if not old:
                    self.run.metrics(step, values)
            elif "ceiling_flops" in fields:
                self.peak_flops = self.peak_flops or fields["ceiling_flops"]
            elif not old:
                self._once(fields)
        if self._place > self._old:
            draft = self._mark.with_suffix(".tmp")
            draft.write_text(str(self._place))
            draft.replace(self._mark)

    def _once(self, fields: dict[str, Any]) -> None:
        """A line that only the first driver to read it takes up."""
        if "event" in fields:
            self.run.event(fields["event"])
            log.info("train | %s", fields["event"])
        elif "picture" in fields:
            self.run.file(Path(fields["picture"]), "pictures")
        elif "rolled_back" in fields:
            self.run.again_after(fields["rolled_back"])
        elif "node" in fields:
            inside = f"system/{fields['node']}/"
            self.run.sample({k.replace("system/", inside): v for k, v in fields.items() if k.startswith("system/")})
        elif "checkpoint" in fields:
            log.debug("checkpoint %d | %.2f s", fields["checkpoint"], fields["took_s"])

    def draw_curves(self) -> None:
        """Losses over steps, as a figure of the run."""
        lines = [Line(label=name, x=list(points), y=list(points.values()), tone=tone)
                 for tone, (name, points) in enumerate(sorted(self._curves.items())) if name in CURVES]  # fmt: skip
        if lines:
            path = self.path.with_name("loss.svg")
            path.write_text(line_chart(lines, x_label="step", y_label="loss"))
            self.run.file(path, "figures")

    def _lines(self) -> Iterator[tuple[dict[str, Any], bool]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._place)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                old = self._place < self._old
                self._place += len(line)
                yield json.loads(line), old

    def _metrics(self, fields: dict[str, Any], old: bool) -> None:
        step, plan = fields["step"], self.plan
        values = {k: float(v) for k, v in fields.items() if k not in ("step", "time_s") and _finite(v)}
        per_s = values["samples_per_s"] * plan.frames
        values["tokens_per_s"] = per_s * plan.tokens
        if self.peak_flops:
            values["mfu"] = per_s * plan.frame_flops / (self.peak_flops * fields["world"])
        for name, value in values.items():
            self._curves.setdefault(name, {})[step] = value
        self.final |= values
        self.step = step
        if not old:
            self.run.metrics(step, values)
            eta_s = (plan.steps - step) * values["step_s"]
            log.info(
                "step %d/%d | loss %.4f | dt %.0f ms | %.1f samples/s | mfu %.0f%% | data wait %.0f%% | eta %s",
                step, plan.steps, fields.get("loss", math.nan), 1000 * values["step_s"], values["samples_per_s"],
                100 * values.get("mfu", 0), 100 * values["data_wait_s"] / values["step_s"],
                time.strftime("%H:%M:%S", time.gmtime(eta_s)),
            )  # fmt: skip


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
