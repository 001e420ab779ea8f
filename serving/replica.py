"""One replica of a world: its engine as a Ray Serve deployment, and the application that a version of a world is."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from models.config import SamplerConfig
from serving.config import ServeConfig
from serving.protocol import ModelInfo, Prompted, StepJob, Stepped
from serving.scaling import QUEUE, SESSIONS

if TYPE_CHECKING:
    from serving.engine import Engine

ROUTER: Any = "serving.router.PinningRouter"
SCALING = "serving.scaling:DesiredReplicas"
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")
LIFE: dict[str, Any] = {
    "health_check_period_s": 1,
    "health_check_timeout_s": 10,
    "graceful_shutdown_timeout_s": 10,
    "logging_config": QUIET,
}
PREFIX = "world-"
LIVE_S = 15.0
"""A session counts as played for this long after a step."""


class WorldModel:
    """One replica of a world: an `Engine`, warmed up before it counts as ready."""

    def __init__(self, config: ServeConfig, path: Path, reference: str) -> None:
        self._engine = load_engine(config, path, reference)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._stepped_at: dict[str, float] = {}
        self._waits: deque[float] = deque(maxlen=100)

    async def info(self) -> ModelInfo:
        """What is served."""
        return self._engine.info

    async def prompt(self, frames_THWC: np.ndarray) -> Prompted:
        """See `serving.protocol.Model`."""
        return await self._engine.prompt(frames_THWC)

    async def step(self, job: StepJob) -> tuple[str, Stepped | None]:
        """One step, and the name of this replica, where the session now lives."""
        return self._name, await self._step(job)

    async def steps(self, jobs: list[StepJob]) -> AsyncIterator[list[tuple[int, Stepped | Exception | None]]]:
        """Steps of several sessions: their outcomes by index, each as soon as it is there, with those that are too."""
        under_way = {asyncio.ensure_future(self._step(job)): i for i, job in enumerate(jobs)}
        while under_way:
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # frames of one pass are handed out one after another
            yield [(under_way.pop(task), _outcome(task)) for task in list(under_way) if task.done()]

    async def forget(self, session: str) -> None:
        """Frees a session's slot."""
        await self._engine.forget(session)

    async def _step(self, job: StepJob) -> Stepped | None:
        self._stepped_at[job.session] = time.monotonic()
        done = await self._engine.step(job)
        if done is not None:
            self._waits.append(done.queue_s)
        return done

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's controller is told for `serving.scaling`: sessions that play here, and their mean wait."""
        since = time.monotonic() - LIVE_S
        self._stepped_at = {session: at for session, at in self._stepped_at.items() if at > since}
        waits = list(self._waits) if self._stepped_at else []
        return {SESSIONS: float(len(self._stepped_at)), QUEUE: sum(waits) / len(waits) if waits else 0.0}

    def check_health(self) -> None:
        """Has Serve replace the replica when its engine has stopped."""
        if not self._engine.alive:
            raise RuntimeError("the engine has stopped")


class Front:
    """What Serve takes for the application's ingress, which behind HAProxy may not choose its router. Gateways call the
    model itself, so this never has a replica."""

    def __init__(self, model: object) -> None:
        self._model = model


def application_name(reference: str) -> str:
    """The Serve application that runs a version: `world-toy-v1` for toy@v1."""
    return PREFIX + reference.replace("@", "-")


def reference_of(application: str) -> str | None:
    """The version that a Serve application runs; None for other applications."""
    name, _, version = application.removeprefix(PREFIX).rpartition("-")
    return f"{name}@{version}" if application.startswith(PREFIX) else None


def world_application(config: ServeConfig, reference: str, path: Path) -> serve.Application:
    """A version of a world as an application of its own: it comes and goes without touching another."""
    size: dict[str, Any] = {"num_replicas": config.replicas}
    if config.most_replicas > config.replicas:
        scaling = AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=config.most_replicas,
            initial_replicas=config.replicas,
            upscale_delay_s=1.0,
            downscale_delay_s=config.scale_down_s,
            metrics_interval_s=1.0,
            look_back_period_s=3.0,
            policy=AutoscalingPolicy(policy_function=SCALING, policy_kwargs={"sessions_per_replica": config.slots}),
        )
        size = {"autoscaling_config": scaling}
    model = serve.deployment(
        name=application_name(reference),
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": int(config.device == "cuda")},
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        **size,
        **LIFE,
    )(WorldModel)
    idle = AutoscalingConfig(min_replicas=0, max_replicas=1)
    front = serve.deployment(name="front", autoscaling_config=idle, logging_config=QUIET)(Front)
    return front.bind(model.bind(config, path, reference))


def _outcome(task: "asyncio.Future[Stepped | None]") -> Stepped | Exception | None:
    """A step's result, or what it failed with, which is its own session's affair."""
    error = task.exception()
    return error if isinstance(error, Exception) else task.result()


def load_engine(config: ServeConfig, path: Path, reference: str) -> "Engine":
    """Loads a world onto this replica's device and warms it up."""
    import torch  # gateways never get here: they start in a second and stay small

    from models.world import World
    from serving.engine import Engine

    torch.set_num_threads(config.threads)
    engine = Engine(
        World.load(path, config.device),
        reference=reference,
        sampler=config.sampler or SamplerConfig(),
        slots=config.slots,
        cache_bytes=config.cache_bytes,
    )
    engine.warm_up()
    return engine
