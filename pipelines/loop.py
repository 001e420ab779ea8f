"""The one training loop: the same for every stage, every engine and every number of workers.

Nothing random happens here: samples, draws, warm-ups and rates are functions of the step, so a run that is continued
from a checkpoint goes on exactly as it would have.
"""

import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.cost import ceiling_flops, memory_bytes
from models.quantizer import Codebook
from pipelines.checkpoints import Checkpoints
from pipelines.feed import Batch, Schedule
from pipelines.progress import PROGRESS
from pipelines.stages import Job, export, look
from pipelines.train_config import OptimizerConfig
from pipelines.zero import Engine

log = logging.getLogger(__name__)

STOP = "stop"
SKIPPED = "skipped.json"
INPUTS = ("frames", "tokens", "key", "label", "weight")
"""What models take of a batch."""
RESULT = "result"


class Diverged(RuntimeError):
    """More steps were not finite than the budget allows; the restart goes around their samples."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step: linear warm-up, then flat, cosine (arXiv 1608.03983) or WSD (arXiv 2404.06395)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    fall = 0.0
    if config.schedule == "cosine":
        fall = 0.5 * (1 - math.cos(math.pi * min(1.0, max(0.0, done))))
    elif config.schedule == "wsd" and config.decay_share > 0:
        decay = max(1.0, steps * config.decay_share)
        fall = min(1.0, max(0.0, (step + 1 - steps + decay) / decay))
    return warm * (config.lr + (config.final_lr - config.lr) * fall)


class Journal:
    """Lines about a training, in its folder: what happened survives every process."""

    def __init__(self, folder: Path, active: bool = True) -> None:
        self.path, self.active = folder / PROGRESS, active

    def write(self, **fields: Any) -> None:
        """One line; a single append, so ranks and drivers may write at once."""
        if self.active:
            line = json.dumps({"time_s": round(time.time(), 3), **fields}) + "\n"
            with self.path.open("a") as file:
                file.write(line)

    def event(self, text: str) -> None:
        """Something for the run's timeline."""
        self.write(event=text)


class Average:
    """Exponential average of the weights, on rank 0 where they are whole (ZeRO 0-2)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().float().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After an optimizer step."""
        for name, parameter in model.named_parameters():
            self.weights[name].lerp_(parameter.detach().float(), 1 - self.decay)


class Meter:
    """Sums of a log interval; averaged over micro-batches and ranks when they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.wait_s, self.began, self.steps = 0.0, time.perf_counter(), 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """One micro-batch's metrics, kept as tensors: reading them would wait for the device."""
        for name, value in metrics.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self, engine: Engine, stop: bool) -> tuple[dict[str, float], bool]:
        """Means over the interval and all ranks, and whether any rank wants to stop. A collective; starts anew."""
        names = sorted(self.sums)
        own = [self.sums[n].to(engine.device) / self.counts[n] for n in names]
        own += [torch.tensor(v, device=engine.device) for v in (self.wait_s, float(stop))]
        row = torch.stack([v.float().reshape(()) for v in own])
        if engine.world > 1:
            dist.all_reduce(row)
        row = row / engine.world
        values = dict(zip([*names, "data_wait_s", "stop"], row.tolist(), strict=True))
        took = max(1e-9, time.perf_counter() - self.began)
        steps = max(1, self.steps)
        wants_stop = values.pop("stop") > 0
        values["step_s"], values["data_wait_s"] = took / steps, values["data_wait_s"] / steps
        self.__init__()
        return values, wants_stop


@dataclass(frozen=True)
class Outcome:
    """How a loop ended."""

    step: int
    finished: bool


class Loop:
    """Steps from a checkpoint (or the start) to the end.

    Args:
        job: what to train.
        engine: who takes the steps.
        batches: this rank's micro-batches, from the first step on, in order.
        preempted: says that this node will soon go; may be a collective.
    """

    def __init__(
        self, job: Job, engine: Engine, batches: Iterator[Batch], preempted: Callable[[], bool] = lambda: False
    ) -> None:
        self.job, self.engine, self.batches, self.preempted = job, engine, batches, preempted
        self.config = job.config
        self.checkpoints = Checkpoints(job.folder, self.config.keep)
        self.skipped = read_skipped(job.folder)
        self.schedule: Schedule = job.schedule(tuple(self.skipped))
        self.journal = Journal(job.folder, active=engine.rank == 0)
        self.meter = Meter()
        self.bad: list[int] = []
        self.losses: list[float] = []
        self.average: Average | None = None
        self.saved = -1

    def run(self) -> Outcome:
        """Trains to the last step, or until the stop file or a preemption says otherwise.

        Raises:
            Diverged: too many steps were not finite.
        """
        step = self._resume()
        self.journal.write(pid=os.getpid(), host=socket.gethostname(), world=self.engine.world, at=step)
        self.journal.write(ceiling_flops=ceiling_flops(self.engine.device))
        self.engine.model.train()
        if step == 0:
            self._look(0)
        while step < self.config.steps:
            self._step(step)
            step += 1
            self.meter.steps += 1
            last = step == self.config.steps
            stop = (last or step % self.config.log_every == 0) and self._report(step)
            if last or stop or step % self.config.checkpoint_every == 0:
                self._save(step)
            if last or (self.config.picture_every and step % self.config.picture_every == 0):
                self._look(step)
            if stop and not last:
                return Outcome(step, finished=False)
        self._export()
        return Outcome(step, finished=True)

    def _resume(self) -> int:
        engine, config = self.engine, self.config
        found = self.checkpoints.chosen()
        if config.optimizer.ema_decay and engine.rank == 0:
            self.average = Average(engine.model, config.optimizer.ema_decay)
        if found is None:
            return 0
        folder, manifest = found
        engine.load(folder, manifest)
        if self.average is not None:
            self.average.weights = torch.load(folder / "average.pt", map_location=engine.device, weights_only=True)
        self.saved = manifest["step"]
        self.journal.event(
            f"continued at step {manifest['step']} with {engine.world} workers (before: {manifest['world']})"
        )
        return manifest["step"]

    def _step(self, step: int) -> None:
        model: Any = self.engine.model
        model.begin_step(step, self.config.steps)
        for part in range(self.schedule.per_step // self.engine.world):
            began = time.perf_counter()
            batch = next(self.batches)
            self.meter.wait_s += time.perf_counter() - began
            self.meter.add(self.engine.forward_backward(self._checked(batch, step, part)))
        rate = learning_rate(self.config.optimizer, step, self.config.steps)
        norm = self.engine.step(rate)
        self.meter.add({"grad_norm": torch.tensor(norm), "lr": torch.tensor(rate)} if math.isfinite(norm) else {})
        if math.isfinite(norm):
            model.end_step()
            if self.average is not None:
                self.average.update(model)
        else:
            self._left_out(step)

    def _checked(self, batch: Batch, step: int, part: int) -> dict[str, Tensor]:
        """The batch on the device, after proof that it is the one that the order of samples asks for."""
        micro = step * self.schedule.per_step + part * self.engine.world + self.engine.rank
        first = self.schedule.first_sample(micro)
        if int(batch["sample"][0]) != first or len(batch["sample"]) != self.schedule.micro_batch:
            found = int(batch["sample"][0])
            raise RuntimeError(f"rank {self.engine.rank} got sample {found} at step {step}, the order says {first}")
        arrays = {name: np.ascontiguousarray(batch[name]) for name in INPUTS if name in batch}
        return {name: torch.from_numpy(array).to(self.engine.device) for name, array in arrays.items()}

    def _left_out(self, step: int) -> None:
        """A step that was not finite: nothing was learned from it, its batch is remembered."""
        for module in self.engine.model.modules():
            if isinstance(module, Codebook):
                module.forget()
        number = self.schedule.batch_number(step)
        self.bad.append(number)
        samples = f"{number * self.schedule.batch}..{(number + 1) * self.schedule.batch - 1}"
        self.journal.event(f"step {step} was not finite and is left out (samples {samples})")
        if len(self.bad) > self.config.skip_budget:
            if self.engine.rank == 0:
                write_skipped(self.job.folder, [*self.skipped, *self.bad])
            self.journal.event(f"rolling back around {len(self.bad)} batches that were not finite: {self.bad}")
            raise Diverged(f"{len(self.bad)} steps were not finite, the budget is {self.config.skip_budget}")

    def _report(self, step: int) -> bool:
        """Progress of the interval into the journal; whether to stop here."""
        wants = self.engine.rank == 0 and (self.job.folder / STOP).exists()
        values, stop = self.meter.read(self.engine, bool(wants or self.preempted()))
        values["memory_bytes"] = memory_bytes(self.engine.device)
        values["samples_per_s"] = self.config.batch / values["step_s"]
        values["left_out"] = float(len(self.bad))
        self.losses.append(values.get("loss", math.nan))
        self.journal.write(step=step, world=self.engine.world, **values)
        if stop and step < self.config.steps:
            self.journal.event(f"stopping at step {step} with a checkpoint")
        return stop

    def _save(self, step: int) -> None:
        if step == self.saved:
            return
        began = time.perf_counter()
        draft = self.checkpoints.draft(step)
        self.engine.save(draft)
        if self.average is not None:
            torch.save(self.average.weights, draft / "average.pt")
        facts = {
            "step": step,
            "world": self.engine.world,
            "zero": self.config.zero,
            "engine": self.engine.kind,
            "loss": float(np.mean(self.losses)) if self.losses else math.nan,
        }
        self._together(lambda: self.checkpoints.commit(draft, facts))
        self.losses.clear()
        self.saved = step
        self.journal.write(checkpoint=step, took_s=round(time.perf_counter() - began, 3))

    def _together(self, work: Callable[[], object]) -> None:
        """Work of rank 0 between two barriers."""
        if self.engine.world > 1:
            dist.barrier()
        if self.engine.rank == 0:
            work()
        if self.engine.world > 1:
            dist.barrier()

    def _weights(self) -> dict[str, Tensor]:
        weights = self.engine.weights()
        if self.average is not None:
            weights |= {name: value.cpu() for name, value in self.average.weights.items()}
        return weights

    def _look(self, step: int) -> None:
        """Pictures of what the model does by now."""
        if not self.config.picture_every:
            return
        weights = self._weights()
        if self.engine.rank == 0:
            from pipelines.figures import png

            folder = self.job.folder / "pictures"
            folder.mkdir(exist_ok=True)
            shown, measured = look(self.job, weights)
            for name, picture in shown.items():
                path = folder / f"{name}-{step:07d}.png"
                path.write_bytes(png(picture))
                self.journal.write(picture=str(path))
            self.journal.write(looked=step, **measured)
        self.meter.began = time.perf_counter() if not self.meter.steps else self.meter.began

    def _export(self) -> None:
        weights = self._weights()
        self._together(lambda: export(self.job, weights, self.job.folder / RESULT))


def read_skipped(folder: Path) -> list[int]:
    """Numbers of the batches that a training goes around."""
    path = folder / SKIPPED
    return json.loads(path.read_text()) if path.exists() else []


def write_skipped(folder: Path, numbers: list[int]) -> None:
    """Atomically."""
    draft = folder / f".{SKIPPED}"
    draft.write_text(json.dumps(sorted(set(numbers))))
    draft.replace(folder / SKIPPED)
