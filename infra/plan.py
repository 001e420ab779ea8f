"""Arithmetic of a training before it is paid for: memory by ZeRO stage, operations, hours, checkpoint. No torch."""

from dataclasses import dataclass

from infra.config import UserError

GB = 1e9
WEIGHT, GRADIENT, ADAM, MASTER = 4, 4, 8, 4
"""Bytes a parameter. Weights and sums are fp32 (bf16 computes under autocast); ZeRO keeps its own fp32 copy of what
a worker updates."""


@dataclass(frozen=True)
class Device:
    """What one worker runs on."""

    name: str
    memory_bytes: float
    flops: float
    """Dense bf16 operations a second by the data sheet."""


DEVICES = {
    "h200": Device("H200", 141 * GB, 989e12),
    "h100": Device("H100", 80 * GB, 989e12),
    "a100": Device("A100 80GB", 80 * GB, 312e12),
}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """One training, in numbers.

    Attributes:
        parameters: trained weights.
        frame_flops: operations of forward and backward, per frame of a window.
        frames: frames in a window.
        tokens: tokens in a frame.
        activation_bytes: kept for the backward pass, per window.
        batch: windows in a step over all workers.
        micro_batch: windows a worker holds at once.
        steps: optimizer steps.
        workers: how many.
        tensor: workers in a group that shares blocks' matrices.
        split: parameters that such a group shares.
    """

    parameters: int
    frame_flops: float
    frames: int
    tokens: int
    activation_bytes: float
    batch: int
    micro_batch: int
    steps: int
    workers: int
    tensor: int = 1
    split: int = 0

    @property
    def replicas(self) -> int:
        """Workers, or groups of them, that take different samples."""
        return max(1, self.workers // self.tensor)

    @property
    def stages(self) -> tuple[int, ...]:
        """ZeRO stages that can be chosen."""
        return (0, 1, 2, 3) if self.tensor == 1 else (1, 2)

    def state_bytes(self, zero: int) -> float:
        """Weights, gradients and optimizer states of one worker (ZeRO, arXiv 1910.02054, figure 1, in fp32)."""
        shared = 1 / self.replicas
        held = self.parameters - self.split + self.split / self.tensor
        whole = {"weights": WEIGHT, "gradients": GRADIENT, "adam": ADAM, "master": MASTER if zero else 0}
        split = {0: (), 1: ("adam", "master"), 2: ("adam", "master", "gradients"), 3: tuple(whole)}[zero]
        return held * sum(size * (shared if name in split else 1) for name, size in whole.items())

    def worker_bytes(self, zero: int) -> float:
        """All of one worker's memory."""
        return self.state_bytes(zero) + self.activation_bytes * self.micro_batch

    @property
    def checkpoint_bytes(self) -> float:
        """One checkpoint over all workers: weights, master copy, Adam's two moments."""
        return self.parameters * (WEIGHT + MASTER + ADAM)

    @property
    def seen_tokens(self) -> float:
        """Tokens of all windows of all steps."""
        return float(self.steps) * self.batch * self.frames * self.tokens

    @property
    def flops(self) -> float:
        """Operations of the whole training."""
        return self.frame_flops * self.frames * self.batch * self.steps

    def hours(self, device: Device, mfu: float) -> float:
        """Time on that many devices at a share of their peak."""
        return self.flops / (self.workers * device.flops * mfu) / 3600

    def lines(self, device: Device | None, mfu: float) -> list[str]:
        """What a dry run says."""
        said = [
            f"{self.parameters / 1e6:,.2f} M parameters | {self.steps:,} steps of {self.batch} windows x {self.frames} "
            f"frames x {self.tokens} tokens | {self.seen_tokens / 1e9:,.3g} B tokens | {self.flops:.3g} operations",
            f"batch {self.batch} = {self.replicas} {'workers' if self.tensor == 1 else f'groups of {self.tensor}'} x "
            f"{self.micro_batch} windows x {self.batch // (self.micro_batch * self.replicas)} accumulated",
            f"checkpoint {_size(self.checkpoint_bytes)} | activations {_size(self.activation_bytes)} a window",
        ]
        for zero in self.stages:
            need = self.worker_bytes(zero)
            fits = "" if device is None else " | fits" if need <= device.memory_bytes else " | does not fit"
            said.append(
                f"ZeRO-{zero}: {_size(self.state_bytes(zero))} states + activations = {_size(need)} a worker{fits}"
            )
        if device is not None:
            hours = self.hours(device, mfu)
            said.append(
                f"{self.workers} x {device.name} at {mfu:.0%} of peak: {hours:,.1f} hours ({hours / 24:,.1f} days)"
            )
        return said

    def check(self, zero: int, memory_bytes: float, where: str) -> None:
        """That a worker's memory suffices.

        Raises:
            UserError: it does not; names the first ZeRO stage that would fit.
        """
        need = self.worker_bytes(zero)
        if need <= memory_bytes:
            return
        better = next((z for z in self.stages if z > zero and self.worker_bytes(z) <= memory_bytes), None)
        fix = f"use --zero {better}" if better else "use more workers, a smaller --micro-batch or recomputation"
        raise UserError(f"a worker needs {_size(need)} at --zero {zero}, {where} has {_size(memory_bytes)}: {fix}")


def _size(count: float) -> str:
    """Bytes for people."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"
