"""A served world on Ray Serve: `lampworks serve`.

    players -> Gateway (CPU: doors, sessions, JPEG) -> WorldModel (device: caches, batching), one deployment per world
                       \\-> session journal (SQLite)

Gateways own a session while it is attached; model replicas hold nothing that can't be rebuilt. So a model replica may
die, scale or be replaced while its players' sockets stay open.
"""

import asyncio
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from infra.artifact import resolve
from infra.cluster import connect
from infra.config import Home, UserError
from models.config import SamplerConfig
from serving.config import ServeConfig
from serving.gateway import Gateway
from serving.protocol import Model, ModelInfo, Prompted, StepJob, Stepped
from serving.remote import Handle, RemoteModel
from serving.store import open_store
from serving.worlds import Worlds

if TYPE_CHECKING:
    from serving.engine import Engine

log = logging.getLogger(__name__)

APP = "lampworks"
PROXY_S = 120.0
"""How long the doors may take to open after the application is ready."""
ROUTER: Any = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")
LIFE: dict[str, Any] = {
    "health_check_period_s": 1,
    "health_check_timeout_s": 10,
    "graceful_shutdown_timeout_s": 10,
    "logging_config": QUIET,
}


class WorldModel:
    """One replica of a world: an `Engine`, warmed up before it counts as ready."""

    def __init__(self, config: ServeConfig, path: Path, reference: str) -> None:
        self._engine = _load_engine(config, path, reference)
        self._name = serve.get_replica_context().replica_id.unique_id

    async def info(self) -> ModelInfo:
        """What is served."""
        return self._engine.info

    async def prompt(self, frames_THWC: np.ndarray) -> Prompted:
        """See `serving.protocol.Model`."""
        return await self._engine.prompt(frames_THWC)

    async def step(self, job: StepJob) -> tuple[str, Stepped | None]:
        """One step, and the name of this replica, where the session now lives."""
        return self._name, await self._engine.step(job)

    async def steps(self, jobs: list[StepJob]) -> AsyncIterator[list[tuple[int, Stepped | Exception | None]]]:
        """Steps of several sessions: their outcomes by index, each as soon as it is there, with those that are too."""
        under_way = {asyncio.ensure_future(self._engine.step(job)): i for i, job in enumerate(jobs)}
        while under_way:
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # frames of one pass are handed out one after another
            yield [(under_way.pop(task), _outcome(task)) for task in list(under_way) if task.done()]

    async def forget(self, session: str) -> None:
        """Frees a session's slot."""
        await self._engine.forget(session)

    def check_health(self) -> None:
        """Has Serve replace the replica when its engine has stopped."""
        if not self._engine.alive:
            raise RuntimeError("the engine has stopped")


class GatewayReplica:
    """The doors as a deployment."""

    async def __init__(self, config: ServeConfig, worlds: Mapping[str, Path], *handles: Handle) -> None:
        models: dict[str, Model] = {}
        for reference, handle in zip(worlds, handles, strict=False):
            models[reference] = RemoteModel(handle, await handle.info.remote())
        self._engines = [_load_engine(config, path, name) for name, path in worlds.items() if config.colocated]
        models |= {engine.info.reference: engine for engine in self._engines}
        galleries = {reference: path / "prompts" for reference, path in worlds.items()}
        store = open_store(config.store or str(Home(config.home).sessions_db))
        self._gateway = Gateway(config, Worlds(models, galleries), store)

    def check_health(self) -> None:
        """Has Serve replace the replica when an engine in it has stopped."""
        if not all(engine.alive for engine in self._engines):
            raise RuntimeError("an engine has stopped")

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this for the application behind the proxy."""
        return self._gateway.app()


class ServedWorld:
    """A running application; `stop` (or leaving the `with` block) ends it and everything it started."""

    def __init__(self, config: ServeConfig, url: str, running: ExitStack) -> None:
        self.config, self.url, self._running = config, url, running

    def stop(self) -> None:
        """Shuts Serve down, and Ray where `serve_world` started it. Sessions stay in the journal."""
        self._running.close()

    def wait(self) -> None:
        """Returns when the process is asked to end (Ctrl-C, SIGTERM)."""
        asked = threading.Event()
        before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        while not asked.wait(3600):
            pass
        for number, handler in before.items():
            signal.signal(number, handler)
        log.info("asked to end: stopping")

    def __enter__(self) -> "ServedWorld":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def serve_world(config: ServeConfig, block: bool = False) -> ServedWorld:
    """Serves worlds until it is stopped.

    Args:
        config: what to serve, and where.
        block: wait here for Ctrl-C, then stop.

    Returns:
        The running application, ready for players.

    Raises:
        UserError: the port is taken, or a world artifact is missing or damaged.
    """
    home = Home(config.home)
    worlds = {a.reference: a.path for a in (resolve(home, name, kind="world") for name in config.worlds)}
    port = _claim_port(config.host, config.port)
    if config.cluster.quiet:  # Serve sets its own level when it is imported
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with ExitStack() as stack:
        stack.enter_context(connect(config.cluster))
        # On a cluster that others use too, only our application goes; the proxies stay.
        stack.callback(serve.delete if config.cluster.address != "local" else _shut_down, APP)
        with suppress(TimeoutError):  # Serve waits a minute for its proxy; on a busy machine we wait on, below
            where = "HeadOnly" if config.loopback else "EveryNode"
            serve.start(where, HTTPOptions(host=config.host, port=port), logging_config=QUIET)
        serve.run(application(config, worlds), name=APP, route_prefix="/")
        _await_answer(config.host, port)
        served = ServedWorld(config, f"http://{config.host}:{port}", stack.pop_all())
    log.info("serving | url %s | worlds %s", served.url, ", ".join(worlds))
    if block:
        with served:
            served.wait()
    return served


def application(config: ServeConfig, worlds: Mapping[str, Path]) -> serve.Application:
    """The graph of deployments: one gateway tier in front of one deployment per world."""
    gpus = int(config.device == "cuda")
    handles = []
    for reference, path in () if config.colocated else worlds.items():
        model = serve.deployment(
            name="world-" + reference.replace("@", "-"),
            num_replicas=config.replicas,
            max_ongoing_requests=1024,
            ray_actor_options={"num_cpus": 0.5, "num_gpus": gpus},
            request_router_config=RequestRouterConfig(request_router_class=ROUTER),
            **LIFE,
        )(WorldModel)
        handles.append(model.bind(config, path, reference))
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.gateways,
        max_ongoing_requests=4096,  # a socket counts as one request for as long as it is open
        ray_actor_options={"num_cpus": 0.25, "num_gpus": gpus if config.colocated else 0},
        **LIFE,
    )(serve.ingress()(GatewayReplica))
    return gateway.bind(config, dict(worlds), *handles)


def _outcome(task: "asyncio.Future[Stepped | None]") -> Stepped | Exception | None:
    """A step's result, or what it failed with, which is its own session's affair."""
    error = task.exception()
    return error if isinstance(error, Exception) else task.result()


def _load_engine(config: ServeConfig, path: Path, reference: str) -> "Engine":
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


def _claim_port(host: str, port: int) -> int:
    """The port to use; proves that it is free, since Serve would retry in the background instead of failing."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what uses it, or choose another --port"
            ) from error
        return probe.getsockname()[1]


def _await_answer(host: str, port: int) -> None:
    """Returns when the doors are open.

    Raises:
        UserError: they stay closed: Serve already runs in this cluster, with its proxies on another port.
    """
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/healthz"
    deadline = time.monotonic() + PROXY_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.1)
    raise UserError(f"{url} does not answer: this cluster's Serve listens elsewhere; serve with its --port, or apart")


def _shut_down(name: str) -> None:
    log.info("stopping | application %s", name)
    serve.shutdown()
