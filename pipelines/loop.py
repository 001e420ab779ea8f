"""The one training loop: the same for every stage, every engine and every number of workers.

Nothing random happens here: samples, draws, warm-ups and rates are functions of the step, so a run that is continued
from a checkpoint goes on exactly as it would have.
"""

import functools
import json
import logging
import math
import os
import shutil
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

from infra.memory import keep_freed_memory
from models.cost import ceiling_flops, memory_bytes
from models.quantizer import Codebook
from pipelines.checkpoints import Checkpoints, Writer, at_hand, one_works
from pipelines.feed import Batch, Schedule
from pipelines.jobs import Job
from pipelines.progress import PROGRESS
from pipelines.spikes import Watch, read_skipped, write_skipped
from pipelines.stages import export, look, look_flops
from pipelines.train_config import OptimizerConfig
from pipelines.zero import Engine, in_host_memory

log = logging.getLogger(__name__)

STOP = "stop"
ASK_S = 2.0
"""How often a loop looks whether it should stop."""
LAST_S = 15.0
"""So long before a node goes, a last checkpoint is written."""
LOOK_S = 120.0
"""Pictures that would take longer than this are left out: every worker waits for them."""
INPUTS = ("frames", "tokens", "key", "label", "weight")
"""What models take of a batch."""
RESULT = "result"


class Diverged(RuntimeError):
    """More steps were left out than the budget allows; the restart goes around their samples."""


def write_file(value: Any, path: Path) -> None:
    """Tensors and the like; through Python's file, whose errors say what is wrong, unlike those of torch's own."""
    with path.open("wb") as file:
        torch.save(value, file)


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

    def read(self, engine: Engine) -> dict[str, float]:
        """Means over the interval and all ranks, and the most memory that a rank held. A collective; starts anew."""
        names, steps = sorted(self.sums), max(1, self.steps)
        own = [self.sums[n].to(engine.device) / self.counts[n] for n in names]
        took = max(1e-9, time.perf_counter() - self.began)
        own += [torch.tensor(v / steps, device=engine.device) for v in (self.wait_s, took)]
        held = torch.zeros(engine.world, device=engine.device)  # each rank fills its place, the mean gathers them
        held[engine.rank] = memory_bytes(engine.device)
        row = mean(torch.cat([torch.stack([v.float().reshape(()) for v in own]), held]), engine)
        self.__init__()
        values = dict(zip([*names, "data_wait_s", "step_s"], row[: len(own)].tolist(), strict=True))
        return {**values, "memory_bytes": engine.world * float(row[len(own) :].max())}


def mean(row: Tensor, engine: Engine) -> Tensor:
    """The same numbers of all ranks, averaged. A collective."""
    if engine.world > 1:
        dist.all_reduce(row)
    return row / engine.world


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
        preempted: seconds until a node of a worker goes, if one will; called on all ranks at once.
    """

    def __init__(
        self, job: Job, engine: Engine, batches: Iterator[Batch], preempted: Callable[[], float | None] = lambda: None
    ) -> None:
        self.job, self.engine, self.batches, self.preempted = job, engine, batches, preempted
        self.config = job.config
        self.checkpoints, self.writer = Checkpoints(job.folder, self.config.keep), Writer()
        self.skipped = read_skipped(job.folder)
        self.schedule: Schedule = job.schedule(tuple(self.skipped))
        self.journal = Journal(job.folder, active=engine.rank == 0)
        self.meter = Meter()
        self.watch = Watch(self.config.spike_factor)
        self.bad: list[list[int]] = []
        self.losses: list[float] = []
        self.average: Average | None = None
        self.saved, self.ask_every, self.warned = -1, 1, math.inf
        self.drawing = False

    def run(self) -> Outcome:
        """Trains to the last step, or until the stop file says otherwise.

        Raises:
            Diverged: too many steps were left out.
        """
        if self.engine.device == "cpu":
            keep_freed_memory()
        step = self._resume()
        self.journal.write(pid=os.getpid(), host=socket.gethostname(), world=self.engine.world, at=step)
        self.journal.write(ceiling_flops=ceiling_flops(self.engine.device))
        self.engine.model.train()
        self.drawing = self._draws()
        if step == 0:
            self._look(0)
        stop = False
        while step < self.config.steps and not stop:
            self._step(step)
            step += 1
            self.meter.steps += 1
            stop = self._after(step)
        self.writer.wait()
        if not stop:
            self._export()
        return Outcome(step, finished=not stop)

    def _after(self, step: int) -> bool:
        """What is due after a step: progress, a checkpoint, pictures; says whether to stop here."""
        config, last = self.config, step == self.config.steps
        telling = last or step % config.log_every == 0
        if telling:
            self._report(step)
        asking = not last and (telling or step % self.ask_every == 0)
        stop, leaving = self._asked(step) if asking else (False, False)
        if last or stop or leaving or step % config.checkpoint_every == 0:
            self._save(step)
        if last or (config.picture_every and step % config.picture_every == 0):
            self._look(step)
        return stop

    def _draws(self) -> bool:
        """Whether pictures are wanted and rank 0 can draw them in reasonable time. A collective; rank 0 decides."""
        if not self.config.picture_every:
            return False
        took_s = look_flops(self.job) / ceiling_flops("cpu") if self.engine.rank == 0 else 0.0
        took_s = self.engine.world * float(mean(torch.tensor(took_s, device=self.engine.device), self.engine))
        if took_s > LOOK_S:
            self.journal.event(f"no pictures: on this processor they would take {took_s / 60:.0f} minutes or more")
        return took_s <= LOOK_S

    def _resume(self) -> int:
        engine, config = self.engine, self.config
        found = self.checkpoints.chosen()
        if config.optimizer.ema_decay and engine.rank == 0:
            self.average = Average(engine.model, config.optimizer.ema_decay)
        if found is None:
            return 0
        path, manifest = found
        with at_hand(path, os.environ.get("LOCAL_RANK", "0") == "0", self._barrier) as folder:
            engine.load(folder, manifest)
            if self.average is not None:
                self.average.weights = torch.load(folder / "average.pt", map_location=engine.device, weights_only=True)
        self.saved, self.bad = manifest["step"], manifest.get("bad", [])  # earlier releases wrote neither
        self.watch.seen |= manifest.get("seen", {})
        self.checkpoints.floor = self.bad[0][0] if self.bad else None
        self.journal.event(
            f"continued at step {manifest['step']} with {engine.world} workers (before: {manifest['world']})"
        )
        return manifest["step"]

    def _step(self, step: int) -> None:
        model: Any = self.engine.model
        model.begin_step(step, self.config.steps)
        self.writer.check()
        losses: list[Tensor] = []
        for part in range(self.schedule.per_step // self.engine.data_world):
            began = time.perf_counter()
            batch = next(self.batches)
            self.meter.wait_s += time.perf_counter() - began
            metrics = self.engine.forward_backward(self._checked(batch, step, part))
            losses.append(metrics["loss"].detach())
            self.meter.add(metrics)
        rate = learning_rate(self.config.optimizer, step, self.config.steps)
        loss = float(mean(torch.stack(losses).mean(), self.engine)) if self.watch.factor else 0.0
        limit = self.watch.limit("norm") if not loss > self.watch.limit("loss") else 0.0
        norm = self.engine.step(rate, limit)
        self.meter.add({"grad_norm": torch.tensor(norm), "lr": torch.tensor(rate)} if math.isfinite(norm) else {})
        if math.isfinite(norm) and norm <= limit:
            self.watch.add(loss, norm)
            model.end_step()
            if self.average is not None:
                self.average.update(model)
        else:
            self._left_out(step, self.watch.reason(loss, norm))

    def _checked(self, batch: Batch, step: int, part: int) -> dict[str, Tensor]:
        """The batch on the device, after proof that it is the one that the order of samples asks for."""
        micro = step * self.schedule.per_step + part * self.engine.data_world + self.engine.data_rank
        first = self.schedule.first_sample(micro)
        if int(batch["sample"][0]) != first or len(batch["sample"]) != self.schedule.micro_batch:
            found = int(batch["sample"][0])
            raise RuntimeError(f"rank {self.engine.rank} got sample {found} at step {step}, the order says {first}")
        arrays = {name: np.ascontiguousarray(batch[name]) for name in INPUTS if name in batch}
        return {name: torch.from_numpy(array).to(self.engine.device) for name, array in arrays.items()}

    def _left_out(self, step: int, reason: str) -> None:
        """A step that was not finite or spiked: nothing was learned from it, its batch is remembered."""
        for module in self.engine.model.modules():
            if isinstance(module, Codebook):
                module.forget()
        number = self.schedule.batch_number(step)
        self.bad.append([step, number])
        self.checkpoints.floor = self.bad[0][0]
        samples = f"{number * self.schedule.batch}..{(number + 1) * self.schedule.batch - 1}"
        self.journal.event(f"step {step} {reason} and is left out (samples {samples})")
        if len(self.bad) > self.config.skip_budget:
            self.writer.wait()
            self._together(self._roll_back)
            raise Diverged(f"{len(self.bad)} steps were left out, the budget is {self.config.skip_budget}")

    def _roll_back(self) -> None:
        """The next start goes on from before the first step that was left out, around the batches of all of them."""
        numbers = [number for _, number in self.bad]
        self.checkpoints.forget_after(self.bad[0][0])
        write_skipped(self.job.folder, [*self.skipped, *numbers])
        self.journal.write(rolled_back=self.bad[0][0])
        self.journal.event(f"rolling back before step {self.bad[0][0]}, around {len(numbers)} batches: {numbers}")

    def _report(self, step: int) -> None:
        """Progress of the interval into the journal."""
        values = self.meter.read(self.engine)
        self.ask_every = max(1, int(ASK_S / values["step_s"]))
        values["samples_per_s"] = self.config.batch / values["step_s"]
        values["left_out"] = float(len(self.bad))
        self.losses.append(values.get("loss", math.nan))
        self.journal.write(step=step, world=self.engine.world, **values)

    def _asked(self, step: int) -> tuple[bool, bool]:
        """Whether to stop, and whether a node is about to go: both call for a checkpoint. A collective; rank 0 decides.

        A node that will go asks for one at once, and for another shortly before.
        """
        left = self.preempted()
        leaving = left is not None and (self.warned == math.inf or left < LAST_S <= self.warned)
        wants = [(self.job.folder / STOP).exists(), leaving] if self.engine.rank == 0 else [False, False]
        stop, leaving = (mean(torch.tensor(wants, device=self.engine.device).float(), self.engine) > 0).tolist()
        if leaving and left is not None:
            self.warned = min(left, 1e9)
        if stop or leaving:
            why = "stopping" if stop else f"a node goes in {left or 0:.0f} s: going on"
            self.journal.event(f"{why} at step {step} with a checkpoint")
        return stop, leaving

    def _save(self, step: int) -> None:
        """A copy of the state, written meanwhile."""
        if step == self.saved:
            return
        began = time.perf_counter()
        self.writer.wait()
        state = self.engine.snapshot()
        if self.average is not None:
            state["average.pt"] = in_host_memory(self.average.weights)
        facts = {
            "step": step,
            "world": self.engine.world,
            "zero": self.config.zero,
            "tensor": self.config.tensor,
            "engine": self.engine.kind,
            "loss": float(np.mean(self.losses)) if self.losses else math.nan,
            "seen": self.watch.seen.copy(),
            "bad": self.bad.copy(),
        }
        work = functools.partial(self._write, state, facts, began)
        if self.config.keep.background:
            self.writer.start(work)
        else:
            work()
        self.losses.clear()
        self.saved = step
        self.journal.write(held=step, took_s=round(time.perf_counter() - began, 4))

    def _write(self, state: dict[str, Any], facts: dict[str, Any], began: float) -> None:
        files = {name: functools.partial(write_file, value) for name, value in state.items()}
        self.checkpoints.share(facts["step"], self.engine.rank, files)
        if self.engine.rank == 0:
            self.checkpoints.commit(facts)
            self.journal.write(checkpoint=facts["step"], took_s=round(time.perf_counter() - began, 4))

    def _barrier(self) -> None:
        if self.engine.world > 1:
            dist.barrier()

    def _together(self, work: Callable[[], object]) -> None:
        """Work of rank 0 that the others wait for."""
        one_works(work, self.engine.rank == 0, self.job.folder / "rank-0.done", self._barrier)

    def _weights(self) -> dict[str, Tensor]:
        weights = self.engine.weights()
        if self.average is not None:
            weights |= {name: value.cpu() for name, value in self.average.weights.items()}
        return weights

    def _look(self, step: int) -> None:
        """Pictures of what the model does by now; rank 0 draws them on its processor while the others wait."""
        if not self.drawing:
            return
        weights = self._weights()

        def draw() -> None:
            from pipelines.figures import png

            folder = self.job.folder / "pictures"
            folder.mkdir(exist_ok=True)
            shown, measured = look(self.job, weights)
            for name, picture in shown.items():
                path = folder / f"{name}-{step:07d}.png"
                path.write_bytes(png(picture))
                self.journal.write(picture=str(path))
            self.journal.write(looked=step, **measured)

        self._together(draw)
        self.meter.began = time.perf_counter() if not self.meter.steps else self.meter.began

    def _export(self) -> None:
        weights = self._weights()
        result = self.job.folder / RESULT

        def write() -> None:
            shutil.rmtree(result, ignore_errors=True)  # what a start before left half-written
            export(self.job, weights, result)

        self._together(write)
