"""`lampworks train <stage>`: one command that trains, continues, or finds the work done.

The driver plans the job, starts Ray Train's workers (or runs the loop here with --workers 0), tells of progress, feeds
MLflow from the training's journal, and publishes the result. All state lies in the training's folder and in the
tracking outbox, so driver, workers and nodes may die at any time: the same command goes on.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.artifact import Artifact, find, publish
from infra.cluster import connect
from infra.config import Home, UserError, to_dict
from infra.plan import DEVICES, TrainingPlan
from infra.tracking import Run
from models.config import ModelError
from pipelines.checkpoints import Checkpoints
from pipelines.progress import Follower
from pipelines.train_config import TrainConfig

if TYPE_CHECKING:
    import ray.data

    from pipelines.stages import Job

log = logging.getLogger(__name__)

REFUSED = "refused.txt"
POLL_S = 0.5
HANG_S = 300.0
"""A collective that takes longer is taken as hung; the workers are started again."""


class Interrupted(UserError):
    """Ctrl-C, after a checkpoint."""


def command(config: TrainConfig) -> Artifact | str:
    """`lampworks train`: with --dry-run it only says what it would take."""
    return dry_run(config) if config.dry_run else train(config)


def dry_run(config: TrainConfig) -> str:
    """Memory, operations and hours of a training, without a dataset; see `TrainingPlan`.

    Raises:
        UserError: with --gpu, when a worker's memory does not suffice at the chosen ZeRO stage.
    """
    from pipelines.stages import estimate

    device = DEVICES[config.device] if config.gpu else None
    plan = estimate(config, config.model)
    said = "\n".join(plan.lines(device, config.mfu))
    log.info("dry run of train %s\n%s", config.stage, said)
    if device is not None:
        plan.check(config.zero, device.memory_bytes, f"one {device.name}")
    return said


def _check_memory(job: "Job", plan: TrainingPlan) -> None:
    """That this machine can hold the workers, where they are on its CPUs."""
    if job.config.gpu or job.config.cluster.address != "local":
        return
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    plan.check(job.config.zero, total / plan.workers, f"a worker's share of this machine ({plan.workers} workers)")


def train(config: TrainConfig) -> Artifact:
    """Trains one stage and publishes its artifact; an identical training that is finished is returned as it is.

    Raises:
        UserError: something the stage stands on is missing or does not fit, or training was interrupted.
    """
    from pipelines.stages import KINDS, estimate, plan_job

    job = plan_job(config)
    home = Home(job.config.home)
    done = find(home, name=config.artifact_name, identity=job.identity)
    if done is not None:
        log.info("train %s: %s is this training already", config.stage, done.reference)
        return done
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in ("stop", REFUSED):
        (job.folder / name).unlink(missing_ok=True)
    plan = estimate(job.config, job.model)
    _check_memory(job, plan)
    count = plan.parameters
    log.info("train %s | %.2f M parameters | %d steps of %d windows | workers %d | %s",
             config.stage, count / 1e6, config.steps, config.batch, config.workers, job.folder)  # fmt: skip
    run = Run(config.tracking, home, name=config.artifact_name, key=job.identity, folder=job.folder)
    run.params({**to_dict(job.config), "model": to_dict(job.model), "parameters": count})
    run.tags({"stage": config.stage, "identity": job.identity, **{f"parent.{k}": v for k, v in job.parents.items()}})
    peak = DEVICES[config.device].flops if config.gpu else None
    follower = Follower(job.folder, run, plan, peak)
    try:
        _run(job, follower)
        follower.draw_curves()
        metrics = follower.final | _measured(job.folder / "result", run)
        made = publish(home, name=config.artifact_name, kind=KINDS[config.stage], source_dir=job.folder / "result",
                       config=job.settings, parents=job.parents, metrics=metrics, identity=job.identity)  # fmt: skip
    except BaseException as error:
        run.event(f"ended: {type(error).__name__}: {str(error)[:300]}")
        run.close("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise
    run.tags({"artifact": made.reference})
    if made.kind == "world":
        run.model(made.path, made.reference, made.fingerprint)
    run.event(f"published {made.reference}")
    run.close()
    shutil.rmtree(job.folder / "result")
    log.info("train %s: published %s", config.stage, made.reference)
    return made


def _measured(result: Path, run: Run) -> dict[str, float]:
    """What a stage measured of its result when it wrote it; the charts go to the run."""
    for chart in sorted(result.glob("*.svg")):
        run.file(chart, "figures")
    path = result / "measures.json"
    return json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.exists() else {}


def _run(job: "Job", follower: Follower) -> None:
    """To the end, in workers or here; the console and MLflow follow meanwhile."""
    if not job.config.workers:
        _followed(job, follower, _here)
    else:
        with connect(job.config.cluster):
            _followed(job, follower, _fit)
    refused = job.folder / REFUSED
    if refused.exists():
        raise UserError(refused.read_text())
    if not (job.folder / "result").exists():
        raise Interrupted(f"training stopped at step {follower.step} with a checkpoint: the same command continues it")


def _followed(job: "Job", follower: Follower, work: Callable[["Job"], None]) -> None:
    """The work in a thread, so that this one can tell of progress and take Ctrl-C."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            work(job)
        except BaseException as error:  # noqa: BLE001 carried to the main thread and raised there
            failed.append(error)

    thread = threading.Thread(target=body, name="training")
    thread.start()
    stopped = False
    while thread.is_alive():
        try:
            thread.join(POLL_S)
            follower.follow()
        except KeyboardInterrupt:
            if stopped:
                raise
            stopped = True
            (job.folder / "stop").touch()
            log.warning("interrupted: waiting for a checkpoint (again to leave without one)")
    follower.follow()
    if failed:
        raise failed[0]


def _here(job: "Job") -> None:
    """The same loop in this process, without Ray."""
    from pipelines.feed import local_batches
    from pipelines.loop import Diverged, Loop, read_skipped
    from pipelines.stages import build
    from pipelines.zero import PlainEngine

    for attempt in range(job.config.max_failures + 1):
        step = starting_step(job)
        schedule = job.schedule(tuple(read_skipped(job.folder)))
        engine = PlainEngine(build(job), job.config)
        try:
            Loop(job, engine, local_batches(job.source, schedule, step)).run()
        except Diverged:
            if attempt == job.config.max_failures:
                raise
            continue
        return


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
        from pipelines.loop import read_skipped

        return stream(job.source, job.schedule(tuple(read_skipped(job.folder))), starting_step(job))

    return make


def _fit(job: "Job") -> None:
    import ray.train
    from ray.data import ExecutionOptions
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig

    config = job.config
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    many: int | tuple[int, int] = (config.min_workers, config.workers) if config.min_workers else config.workers
    TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if config.gpu else "gloo", timeout_s=int(HANG_S)),
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
    ).fit()


def _worker(arguments: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    job: Job = arguments["job"]
    os.environ["DS_ACCELERATOR"] = "cuda" if job.config.gpu else "cpu"
    import ray.train
    import torch

    from pipelines.loop import Loop
    from pipelines.stages import build
    from pipelines.zero import ZeroEngine

    context = ray.train.get_context()
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)  # Ray sets them for several workers; DeepSpeed wants them for one too
    if not job.config.gpu:
        torch.set_num_threads(1)
    found = Checkpoints(job.folder, job.config.keep).chosen()
    try:
        engine = ZeroEngine(build(job), job.config, job.folder, found[1] if found else None)
        shard = ray.train.get_dataset_shard("train")
        batches = iter(shard.iter_batches(batch_size=job.config.micro_batch, batch_format="numpy", prefetch_batches=2))
        Loop(job, engine, batches, lambda: ray.train.get_preemption_info() is not None).run()
    except (UserError, ModelError) as error:
        if context.get_world_rank() == 0:  # trying again would not help: say it to the driver, and end
            (job.folder / REFUSED).write_text(str(error))
