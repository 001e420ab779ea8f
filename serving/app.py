"""A served world on Ray Serve: `lampworks serve`.

    players -> Gateway (CPU: doors, sessions, JPEG) -> WorldModel (device: caches, batching), one deployment per world
                       \\-> session journal (SQLite)

Gateways own a session while it is attached; model replicas hold nothing that can't be rebuilt. So a model replica may
die, scale or be replaced while its players' sockets stay open.
"""

import asyncio
import logging
import random
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import replace

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions

from infra.cluster import connect
from infra.config import Home, UserError
from serving.config import ServeConfig
from serving.fleet import AWAY, LOOK_S, Catalogue, Fleet, FleetWorlds, targets
from serving.gateway import Gateway
from serving.listen import listen
from serving.painter import Painter, RemotePainter
from serving.remote import Handle
from serving.replica import LIFE, QUIET, load_engine, reference_of
from serving.store import open_store
from serving.worlds import Choice, Worlds

log = logging.getLogger(__name__)

APP = "lampworks"
CONTROLLER = ("SERVE_CONTROLLER_ACTOR", "serve")
"""Name and namespace of Serve's controller."""
RAY_SETTINGS = {"RAY_worker_niceness": "0"}
"""Of a Ray that is started for players: its workers let every other process go first by default (niceness 15)."""
STOP_S = 120.0
"""How long Serve may take to end."""
FREE_PORTS = range(20000, 30000)
"""Where a free port is looked for: below those that the kernel gives away, so nobody takes it before Serve does."""
PROXY_S = 120.0
"""How long the doors may take to open after the application is ready."""


class GatewayReplica:
    """The doors as a deployment; with models in it when it is colocated."""

    async def __init__(self, config: ServeConfig, fleet: Handle | None, painter: Handle | None = None) -> None:
        store = open_store(config.store or str(Home(config.home).sessions_db))
        if fleet is None:
            self._worlds = await asyncio.to_thread(_loaded, config)
        else:
            self._worlds = FleetWorlds(config, fleet, serve.get_replica_context().replica_id.unique_id)
            await self._worlds.refresh({})
        self._gateway = Gateway(config, self._worlds, store, RemotePainter(painter) if painter else None)
        self._app = self._gateway.app()
        self._tasks = [asyncio.create_task(self._keep_up())]
        if not config.proxied:
            self._tasks.append(asyncio.create_task(listen(self._app, config)))

    async def _keep_up(self) -> None:
        """Counts live sessions, and keeps up with the fleet; while that is away, what was offered stays."""
        while True:
            await asyncio.sleep(LOOK_S)
            live = self._gateway.sessions.live()
            self._gateway.sessions.metrics.live(live)
            if isinstance(self._worlds, FleetWorlds):
                with suppress(*AWAY):
                    await self._worlds.refresh(live)

    def check_health(self) -> None:
        """Has Serve replace the replica when an engine in it, its watch or its doors have stopped."""
        if not self._worlds.alive or any(task.done() for task in self._tasks):
            raise RuntimeError("an engine, the watch of the fleet or the doors have stopped")

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this for the application behind its proxies."""
        return self._app


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
    catalogue = Catalogue(config)
    worlds = {r: catalogue.path(r) for choice in catalogue.look().values() for r in choice.references}
    config = replace(config, port=_claim_port(config.host, config.port))
    if config.cluster.quiet:  # Serve sets its own level when it is imported
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with ExitStack() as stack:
        stack.enter_context(connect(config.cluster, RAY_SETTINGS))
        stack.callback(_stop, config)
        with suppress(TimeoutError):  # Serve waits a minute for its proxy; on a busy machine we wait on, below
            where = "Disabled" if not config.proxied else "HeadOnly" if config.loopback else "EveryNode"
            serve.start(where, HTTPOptions(host=config.host, port=config.port), logging_config=QUIET)
        serve.run_many(
            [*targets(config, {} if config.colocated else worlds), serve.RunTarget(application(config), APP)]
        )
        _await_answer(config.host, config.port)
        served = ServedWorld(config, f"http://{config.host}:{config.port}", stack.pop_all())
    log.info("serving | url %s | worlds %s", served.url, ", ".join(worlds))
    if block:
        with served:
            served.wait()
    return served


def application(config: ServeConfig) -> serve.Application:
    """The gateway tier and the fleet; each version of a world is an application beside this one."""
    fleet = serve.deployment(name="fleet", ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1024, **LIFE)
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.gateways,
        max_ongoing_requests=4096,  # a socket counts as one request for as long as it is open
        ray_actor_options={"num_cpus": 0.25, "num_gpus": int(config.colocated and config.device == "cuda")},
        **LIFE,
    )(serve.ingress()(GatewayReplica))
    painter = serve.deployment(
        name="painter",
        max_ongoing_requests=2,  # one is painted, one waits
        max_queued_requests=16,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": int(config.device == "cuda")},
        **LIFE,
    )
    return gateway.bind(
        config,
        None if config.colocated else fleet(Fleet).bind(config),
        painter(Painter).bind(config) if config.text else None,
    )


def _loaded(config: ServeConfig) -> Worlds:
    """Every configured world in this process."""
    catalogue = Catalogue(config)
    choices = {name: Choice(champion=choice.champion) for name, choice in catalogue.look().items()}
    paths = {choice.champion: catalogue.path(choice.champion) for choice in choices.values()}
    engines = {r: load_engine(config, path, r) for r, path in paths.items()}
    return Worlds(engines, {r: path / "prompts" for r, path in paths.items()}, choices)


def _claim_port(host: str, port: int) -> int:
    """The port to use; proves that it is free, since Serve would retry in the background instead of failing."""
    refused = OSError()
    for wanted in [port] if port else random.sample(FREE_PORTS, 16):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, wanted))
            except OSError as error:
                refused = error
            else:
                return wanted
    raise UserError(
        f"cannot listen on {host}:{port} ({refused.strerror}): stop what uses it, or choose another --port"
    ) from refused


def _await_answer(host: str, port: int) -> None:
    """Returns when the doors are open.

    Raises:
        UserError: they stay closed: Serve already runs in this cluster, with its proxies on another port.
    """
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/readyz"
    deadline = time.monotonic() + PROXY_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5, trust_env=False).is_success:
                return
        time.sleep(0.1)
    raise UserError(f"{url} does not answer: this cluster's Serve listens elsewhere; serve with its --port, or apart")


def _stop(config: ServeConfig) -> None:
    """Ends Serve where it is ours; on a cluster that others use too, only our applications go, and the proxies stay."""
    log.info("stopping | application %s", APP)
    if config.cluster.address == "local":
        _end_controller()
        serve.shutdown()
        return
    for name in [APP, *(n for n in serve.status().applications if reference_of(n))]:
        serve.delete(name)


def _end_controller() -> None:
    """Has Serve's controller end everything and itself. `serve.shutdown` alone waits in a call that the controller's
    end then fails, and Ray tells of that on the console."""
    with suppress(ValueError, RayError):  # there is none, or it is gone
        controller = ray.get_actor(*CONTROLLER)
        ray.get(controller.graceful_shutdown.remote(False))
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            ray.get_actor(*CONTROLLER)
            time.sleep(0.1)
