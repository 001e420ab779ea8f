"""Engines that take the optimizer's step: DeepSpeed ZeRO over many workers, or plain torch in one process.

Both have the same door (`Engine`), so the loop, its tests and a debugger run the same step.
"""

import argparse
import contextlib
import logging
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from infra.config import UserError
from pipelines import tensor
from pipelines.checkpoints import one_works
from pipelines.train_config import OptimizerConfig, TrainConfig

log = logging.getLogger(__name__)

TAG = "state"
PLAIN_FILE, BUFFERS_FILE = "plain.pt", "buffers.pt"
QUIET = 10**9

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]


class Engine(ABC):
    """What the loop asks of an engine.

    Attributes:
        rank: of this process, of `world`.
        data_rank: which share of a step's samples it takes, of `data_world`; workers of one tensor group take the same.
    """

    kind: str
    model: nn.Module
    config: TrainConfig
    device: str
    rank: int
    world: int
    data_rank: int
    data_world: int

    @abstractmethod
    def forward_backward(self, batch: Batch) -> Losses:
        """Metrics of one micro-batch; its gradients are added up until `step`."""

    @abstractmethod
    def step(self, lr: float, limit: float = math.inf) -> float:
        """One optimizer step, unless the gradients are not finite or their norm is above the limit.

        Returns:
            Their norm over all workers, not finite when they are not.
        """

    @abstractmethod
    def snapshot(self) -> dict[str, Any]:
        """A copy of this rank's share of the state in host memory: name of a file -> what belongs into it."""

    @abstractmethod
    def load(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Takes up a saved state, also one of another number of workers.

        Raises:
            UserError: it is of another kind of engine.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The whole model in fp32 on rank 0 (a collective; empty on the other ranks)."""


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves a step out when gradients are not finite, and says so in `overflow` as ZeRO's optimizers do.

    Attributes:
        limit: a step whose norm is larger is left out too.
        norm: tells the gradients' norm over all workers, which no partition knows.
    """

    limit = math.inf
    norm: Callable[[], Any] = staticmethod(lambda: 0.0)

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """The step, unless a gradient is not finite or the norm is too large."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        total = torch.stack([g.float().sum() for g in grads]).sum() if grads else torch.zeros(())
        self.overflow = not bool(torch.isfinite(total))
        return None if self.overflow or float(self.norm() or 0.0) > self.limit else super().step(closure)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on gains, biases and codebooks."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = {n for n, p in named if p.ndim < 2 or n.endswith("codes")}
    groups = [
        {"params": [p for n, p in named if n not in plain], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if n in plain], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> GuardedAdamW:
    """AdamW over the model's parameters, fused: it goes over memory once. The loop sets the rate before each step."""
    return GuardedAdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, fused=True)


class PlainEngine(Engine):
    """Plain torch in one process: for debugging, for unit tests, and for machines without Ray."""

    kind = "plain"

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.device = "cuda" if config.gpu else "cpu"
        self.model, self.config = model.to(self.device), config
        self.rank, self.world, self.data_rank, self.data_world = 0, 1, 0, 1
        self.optimizer = make_optimizer(model, config.optimizer)
        self._parts = config.batch // config.micro_batch

    @override
    def forward_backward(self, batch: Batch) -> Losses:
        """See Engine."""
        with autocast(self.config, self.device):
            loss, metrics = self.model(batch)
        (loss / self._parts).backward()
        return metrics

    @override
    def step(self, lr: float, limit: float = math.inf) -> float:
        """See Engine."""
        set_lr(self.optimizer, lr)
        most = self.config.optimizer.clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), most))
        if norm <= limit:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @override
    def snapshot(self) -> dict[str, Any]:
        """See Engine."""
        return in_host_memory(
            {PLAIN_FILE: {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}}
        )

    @override
    def load(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """See Engine."""
        if manifest["engine"] != "plain":
            raise UserError(f"{folder} was written by {manifest['world']} workers: continue it with --workers above 0")
        state = torch.load(folder / PLAIN_FILE, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @override
    def weights(self) -> dict[str, Tensor]:
        """See Engine."""
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}


class ZeroEngine(Engine):
    """DeepSpeed ZeRO 0-3 inside an initialised process group.

    Args:
        model: built alike on every rank (same seed).
        config: of the training.
        folder: shared by the ranks, for the conversion to a universal checkpoint.
        checkpoint: manifest of the checkpoint that will be loaded, if any.
    """

    kind = "zero"

    def __init__(
        self, model: nn.Module, config: TrainConfig, folder: Path, checkpoint: Mapping[str, Any] | None
    ) -> None:
        deepspeed = import_deepspeed()
        self.rank, self.world, self.config, self.folder = dist.get_rank(), dist.get_world_size(), config, folder
        if self.world % config.tensor:
            raise UserError(f"{self.world} workers can't form groups of --tensor {config.tensor}: change --workers")
        self.data_rank, self.data_world = self.rank // config.tensor, self.world // config.tensor
        parts = config.batch // config.micro_batch
        if parts % self.data_world:
            raise UserError(
                f"{parts} micro-batches a step can't be shared by {self.data_world} workers: change --batch"
            )
        shape = (self.world, config.zero, config.tensor)
        self.universal = checkpoint is not None and shape != (
            checkpoint["world"], checkpoint["zero"], checkpoint.get("tensor", 1)
        )  # fmt: skip
        settings = deepspeed_settings(config, self.data_world, self.universal)
        if config.tensor > 1:
            settings["tensor_parallel"] = tensor.settings(model, config.tensor)
        self._deepspeed = deepspeed
        self._guard = make_optimizer(model, config.optimizer)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(model=model, optimizer=self._guard, config=settings)
        # DeepSpeed's groups are its own, with torch's default of half an hour
        groups = [deepspeed.utils.groups._clone_world_group()]
        self.model: nn.Module = self._engine.module
        if config.tensor > 1:
            groups += tensor.settle(self._engine, config.tensor)
        for group in groups:
            _set_pg_timeout(timedelta(seconds=config.hang_s), group)
        self.device = str(self._engine.device)
        self._taken: dict[str, Any] = {}
        self._engine.checkpoint_engine.save = self._take  # what DeepSpeed would write here and now
        self._engine.checkpoint_engine.makedirs = self._engine._copy_recovery_script = _nothing

    @override
    def forward_backward(self, batch: Batch) -> Losses:
        """See Engine."""
        loss, metrics = self._engine(batch)
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; the boundary's own step is `step`
        return metrics

    @override
    def step(self, lr: float, limit: float = math.inf) -> float:
        """See Engine."""
        set_lr(self._optimizer, lr)
        norm = self._norm_without_zero() if self.config.zero == 0 else None
        self._guard.limit = limit
        self._guard.norm = lambda: norm if self.config.zero == 0 else self._optimizer._global_grad_norm
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return float("nan") if self._optimizer.overflow or norm is None else float(norm)

    def _norm_without_zero(self) -> float:
        """ZeRO-0 keeps no norm; the gradients are whole and equal on every rank."""
        grads = [p.grad.float().norm() for p in self.model.parameters() if p.grad is not None]
        return float(torch.stack(grads).norm())

    @override
    def snapshot(self) -> dict[str, Any]:
        """See Engine. A collective."""
        self._taken = {BUFFERS_FILE: in_host_memory(self._buffers())} if self.rank == 0 else {}
        self._engine.save_checkpoint(".", tag=TAG, client_state={}, save_latest=False)
        return self._taken

    def _take(self, state_dict: Mapping[str, Any], path: str) -> None:
        self._taken[os.path.normpath(path)] = in_host_memory(state_dict)

    @override
    def load(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """See Engine. Another number of workers or ZeRO stage goes through DeepSpeed's universal checkpoint."""
        if manifest["engine"] != "zero":
            raise UserError(f"{folder} was written in one process: continue it with --workers 0")
        if self.universal and 0 in (manifest["zero"], self.config.zero) and manifest["zero"] != self.config.zero:
            raise UserError(f"{folder} is of --zero {manifest['zero']}: continue it with that, or with another --seed")
        source = self._universal(folder) if self.universal and self.config.zero else folder
        decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        path, _ = self._engine.load_checkpoint(str(source), tag=TAG, load_lr_scheduler_states=False)
        if path is None:
            raise UserError(f"DeepSpeed found nothing to load in {source}: remove that folder")
        if source != folder and self.config.zero == 3:
            self._mend(decays)
        buffers = torch.load(folder / BUFFERS_FILE, map_location=self.device, weights_only=True)
        for name, buffer in self._buffers().items():
            buffer.copy_(buffers[name])
        dist.barrier()
        if source != folder and self.rank == 0:
            shutil.rmtree(source)

    def _mend(self, decays: list[float]) -> None:
        """What DeepSpeed 0.19's universal load gets wrong under ZeRO-3: all groups share one counter of steps, so it
        counts several times a step, and all get the weight decay of the first."""
        for state in self._optimizer.optimizer.state.values():
            state["step"] = torch.as_tensor(state["step"]).clone()
        for group, decay in zip(self._optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    def _buffers(self) -> dict[str, Tensor]:
        """Codebooks and the like: DeepSpeed's universal checkpoint holds parameters only."""
        kept = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in kept}

    def _universal(self, folder: Path) -> Path:
        target = self.folder / f"universal-{folder.name}"

        def convert() -> None:
            shutil.rmtree(target, ignore_errors=True)
            to_universal(folder, target)

        one_works(convert, self.rank == 0, target.with_name(f"{target.name}.done"), dist.barrier)
        return target

    @override
    def weights(self) -> dict[str, Tensor]:
        """See Engine."""
        parameters = list(self.model.parameters())
        gather = (
            self._deepspeed.zero.GatheredParameters(parameters) if self.config.zero == 3 else contextlib.nullcontext()
        )
        with gather:
            state = tensor.whole(self.model) if self.config.tensor > 1 else self.model.state_dict()
            if self.rank:
                return {}
            return {name: value.detach().float().cpu().clone() if value.is_floating_point() else value.cpu().clone()
                    for name, value in state.items()}  # fmt: skip


def deepspeed_settings(config: TrainConfig, world: int, universal: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration (deepspeed.ai/docs/config-json)."""
    zero: dict[str, Any] = {
        "stage": config.zero,
        "contiguous_gradients": True,
        "overlap_comm": config.gpu,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if config.zero == 3:
        zero |= {"stage3_param_persistence_threshold": 10_000, "stage3_prefetch_bucket_size": 10_000_000}
    if config.offload:
        there = {"device": "cpu", "pin_memory": config.gpu}
        zero |= {"offload_optimizer": there} | ({"offload_param": there} if config.zero == 3 else {})
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.batch // config.micro_batch // world,
        "gradient_clipping": config.optimizer.clip_norm,
        "steps_per_print": QUIET,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its cpu_adam compiles for minutes
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "checkpoint": {"load_universal": universal and config.zero > 0},
    }


def import_deepspeed() -> Any:
    """DeepSpeed, quiet and without the compilation of shm_comm, which takes minutes or needs ninja."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = dist.get_backend() if dist.is_initialized() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def to_universal(source: Path, target: Path) -> None:
    """A checkpoint of any number of workers as one that any number can load."""
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source / TAG),
            output_folder=str(target / TAG),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    for name in ("latest", "latest_universal"):
        (target / name).write_text(TAG)


def in_host_memory(state: Any) -> Any:
    """A copy of nested dictionaries and lists, with tensors that nobody else changes."""
    return tree_map_only(Tensor, _copied, state)


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of what DeepSpeed does to folders."""


def set_lr(optimizer: Any, lr: float) -> None:
    """The rate of the next step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@contextlib.contextmanager
def autocast(config: TrainConfig, device: str) -> Iterator[None]:
    """bfloat16 where torch holds it safe, if the precision says so."""
    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
        yield
