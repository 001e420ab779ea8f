"""A training's workers on Ray Train: how many, what each runs, when they start again, what is said when they don't."""

import contextlib
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.config import UserError
from models.config import ModelError
from pipelines.checkpoints import Checkpoints, is_full
from pipelines.spikes import read_skipped

if TYPE_CHECKING:
    import ray.data

    from pipelines.elastic import Trainer
    from pipelines.jobs import Job

REFUSED = "refused.txt"
SAMPLE_S = 15.0
"""Between two looks at how busy a node is."""


def starting_step(job: "Job") -> int:
    """Decides which checkpoint this start goes on from, and tells of damaged ones."""
    from pipelines.loop import Journal

    found, damaged = Checkpoints(job.folder, job.config.keep).choose()
    for sentence in damaged:
        Journal(job.folder).event(sentence)
    return found[1]["step"] if found else 0


def _remaining(job: "Job") -> Callable[[], "ray.data.Dataset"]:
    """Ray Train's controller calls this at every start of the workers: only what is left is streamed."""

    def make() -> "ray.data.Dataset":
        from pipelines.feed import stream

        schedule = job.schedule(tuple(read_skipped(job.folder)))
        return stream(job.source, schedule, starting_step(job), copies=job.config.tensor)

    return make


def fit(job: "Job") -> None:
    """Runs the loop in Ray Train's workers until it ends.

    Raises:
        UserError: it failed more often than the limit allows.
    """
    import ray.train
    from ray.data import ExecutionOptions
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    from pipelines.elastic import Trainer

    config = job.config
    os.environ |= {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # until it looks again how many workers there is room for
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(config.hang_s),  # Ray Train's own barriers
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(config.hang_s),  # and a worker that others await for its data
    }
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    many: int | tuple[int, int] = (config.min_workers, config.workers) if config.min_workers else config.workers
    trainer = Trainer(
        _worker,
        train_loop_config={"job": job, "driver": socket.gethostname()},
        torch_config=TorchConfig(backend="nccl" if config.gpu else "gloo", timeout_s=int(config.hang_s)),
        scaling_config=ScalingConfig(
            num_workers=many, use_gpu=config.gpu, resources_per_worker={"CPU": 1, **({"GPU": 1} if config.gpu else {})}
        ),
        run_config=RunConfig(
            name="ray-train",
            storage_path=str(job.folder),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
        dataset_config=ray.train.DataConfig(
            execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False
        ),
        datasets={"train": _remaining(job)},
    )
    trainer.shares = config.batch // config.micro_batch
    _fit(trainer, job)


def _fit(trainer: "Trainer", job: "Job") -> None:
    from ray.exceptions import RayActorError, RayError
    from ray.train.v2.api.exceptions import TrainingFailedError

    from pipelines.loop import Journal

    for left in reversed(range(job.config.max_failures + 1)):
        try:
            trainer.fit()
            return
        except (TrainingFailedError, RayError) as error:
            if (job.folder / REFUSED).exists():
                return
            # when the workers' controller dies they go with it, and Ray Train starts no other
            if not left or not isinstance(error, RayActorError):
                raise sentence(job, error) from error
            Journal(job.folder).event(f"the controller of the workers died ({type(error).__name__}): starting again")


def sentence(job: "Job", error: Exception) -> UserError:
    """What a training that can't go on says."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = [getattr(failure, "_base_exc", failure) for failure in failures]  # Ray wraps what the workers raise
    for cause in causes:
        if isinstance(cause, UserError):
            return cause
    said = "; ".join(
        dict.fromkeys(f"{type(cause).__name__}: {str(cause).strip().splitlines()[0][:200]}" for cause in causes)
    )
    hint = "give the same command again"
    if any(is_full(cause) or "No space left" in str(cause) for cause in causes):
        hint = "free some space and give the same command again"
    elif any("memory" in str(cause) for cause in causes):
        hint = "lower --micro-batch, raise --zero, or give the workers more memory; the same command continues"
    return UserError(
        f"training failed with {said} (--max-failures {job.config.max_failures}): checkpoints are kept in "
        f"{job.folder}; {hint}"
    )


def _time_left() -> float | None:
    """Seconds until a node of a worker is taken away, if Ray was told so. A barrier of the workers."""
    import ray.train

    info = ray.train.get_preemption_info()
    if info is None:
        return None
    return info.deadline_ms / 1000 - time.time() if info.deadline_ms else math.inf


@contextlib.contextmanager
def telling_of_node(folder: Path, driver: str, every_s: float = SAMPLE_S) -> Iterator[None]:
    """Meanwhile a node's first worker says in the journal what its machine is busy with; of the driver's own machine
    its run tells (`infra.tracking.Run`)."""
    node, done = socket.gethostname(), threading.Event()
    if os.environ["LOCAL_RANK"] != "0" or node == driver:
        yield
        return

    def tell() -> None:
        from infra.tracking import Machine
        from pipelines.loop import Journal

        machine, journal = Machine(), Journal(folder)
        while not done.wait(every_s):
            journal.write(node=node, **machine.sample())

    teller = threading.Thread(target=tell, name="node", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _worker(arguments: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    job: Job = arguments["job"]
    os.environ["DS_ACCELERATOR"] = "cuda" if job.config.gpu else "cpu"
    import ray.train
    import torch

    from pipelines.loop import Loop
    from pipelines.stages import build
    from pipelines.zero import ZeroEngine

    refused: Path = job.folder / REFUSED
    if refused.exists():  # said by a worker of the start before
        return
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)  # Ray sets them for several workers; DeepSpeed wants them for one too
    if not job.config.gpu:
        torch.set_num_threads(1)
    found = Checkpoints(job.folder, job.config.keep).chosen()
    try:
        engine = ZeroEngine(build(job), job.config, job.folder, found[1] if found else None)
        shard = ray.train.get_dataset_shard("train")
        batches = iter(shard.iter_batches(batch_size=job.config.micro_batch, batch_format="numpy", prefetch_batches=2))
        with telling_of_node(job.folder, arguments["driver"]):
            Loop(job, engine, batches, _time_left).run()
    except (UserError, ModelError) as error:  # trying again would not help: say it to the driver, and end with the rest
        refused.write_text(str(error))
        raise
