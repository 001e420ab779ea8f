"""`lampworks train <stage>`: one command that trains, continues, or finds the work done.

The driver plans the job, starts Ray Train's workers (or runs the loop here with --workers 0), tells of progress, feeds
MLflow from the training's journal, and publishes the result. All state lies in the training's folder and in the
tracking outbox, so driver, workers and nodes may die at any time: the same command goes on.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from infra.artifact import Artifact, find, publish
from infra.cluster import connect
from infra.config import Home, UserError, to_dict
from infra.plan import DEVICES, TrainingPlan
from infra.tracking import Run, is_told
from pipelines.checkpoints import Checkpoints, is_full
from pipelines.progress import Follower
from pipelines.spikes import read_skipped
from pipelines.train_config import TrainConfig
from pipelines.workers import REFUSED, fit, starting_step

if TYPE_CHECKING:
    from pipelines.jobs import Job

log = logging.getLogger(__name__)

POLL_S = 0.5


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
    from pipelines.jobs import KINDS, plan_job
    from pipelines.stages import estimate

    job = plan_job(config)
    home = Home(job.config.home)
    done = find(home, name=config.artifact_name, identity=job.identity)
    if done is not None:
        log.info("train %s: %s is this training already", config.stage, done.reference)
        if not is_told(job.folder):
            _tell(_open_run(job), done)
        return done
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in ("stop", REFUSED):
        (job.folder / name).unlink(missing_ok=True)
    Checkpoints(job.folder, job.config.keep).prove()
    plan = estimate(job.config, job.model)
    _check_memory(job, plan)
    count = plan.parameters
    log.info("train %s | %.2f M parameters | %d steps of %d windows | workers %d | %s",
             config.stage, count / 1e6, config.steps, config.batch, config.workers, job.folder)  # fmt: skip
    run = _open_run(job)
    run.params({**to_dict(job.config), "model": to_dict(job.model), "parameters": count})
    run.tags({"stage": config.stage, "identity": job.identity, **{f"parent.{k}": v for k, v in job.parents.items()}})
    peak = DEVICES[config.device].flops if config.gpu else None
    follower = Follower(job.folder, run, plan, peak)
    try:
        _run(job, follower)
        follower.draw_curves()
        metrics = follower.final | _measured(job.folder / "result")
        made = publish(home, name=config.artifact_name, kind=KINDS[config.stage], source_dir=job.folder / "result",
                       config=job.settings, parents=job.parents, metrics=metrics, identity=job.identity)  # fmt: skip
    except BaseException as error:
        run.event(f"ended: {type(error).__name__}: {str(error)[:300]}")
        run.close("KILLED" if isinstance(error, Interrupted) else "FAILED")
        raise
    _tell(run, made)
    shutil.rmtree(job.folder / "result")
    log.info("train %s: published %s", config.stage, made.reference)
    return made


def _open_run(job: "Job") -> Run:
    config = job.config
    return Run(config.tracking, Home(config.home), name=config.artifact_name, key=job.identity, folder=job.folder)


def _tell(run: Run, made: Artifact) -> None:
    """Ends the run with what was made, unless a start before did and only the server was away."""
    if not run.ended:
        run.tags({"artifact": made.reference})
        for chart in sorted(made.path.glob("*.svg")):
            run.file(chart, "figures")
        if made.kind == "world":
            run.model(made.path, made.reference, made.fingerprint)
        run.event(f"published {made.reference}")
    run.close()


def _measured(result: Path) -> dict[str, float]:
    """What a stage measured of its result when it wrote it."""
    path = result / "measures.json"
    return json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.exists() else {}


def _run(job: "Job", follower: Follower) -> None:
    """To the end, in workers or here; the console and MLflow follow meanwhile."""
    try:
        if not job.config.workers:
            _followed(job, follower, _here)
        else:
            with connect(job.config.cluster):
                _followed(job, follower, fit)
    except OSError as error:
        if not is_full(error):
            raise
        raise UserError(
            f"no room in {job.folder}: checkpoints are kept, free some space and give the same command again"
        ) from error
    refused = job.folder / REFUSED
    if refused.exists():
        raise UserError(refused.read_text())
    if not (job.folder / "result").exists():
        raise Interrupted(f"training stopped at step {follower.step} with a checkpoint: the same command continues it")


def _followed(job: "Job", follower: Follower, work: Callable[["Job"], None]) -> None:
    """The work in a thread, so that this one can tell of progress and take Ctrl-C."""
    failed: list[BaseException] = []
    done = threading.Event()

    def body() -> None:
        try:
            work(job)
        except BaseException as error:  # noqa: BLE001 carried to the main thread and raised there
            failed.append(error)
        finally:
            done.set()

    with _stoppable(job.folder / "stop"):
        threading.Thread(target=body, name="training").start()
        while not done.wait(POLL_S):  # joining the thread would call it ended when a signal comes (Python 3.11)
            follower.follow()
    follower.follow()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _stoppable(stop: Path) -> Iterator[None]:
    """Ctrl-C, and a scheduler's SIGTERM, ask for a checkpoint by the stop file; the second one interrupts."""

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.exists():
            raise KeyboardInterrupt
        stop.touch()
        log.warning("interrupted: waiting for a checkpoint (again to leave without one)")

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job
                before[number] = signal.signal(number, ask) or signal.SIG_DFL
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _here(job: "Job") -> None:
    """The same loop in this process, without Ray."""
    from pipelines.feed import local_batches
    from pipelines.loop import Diverged, Loop
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
