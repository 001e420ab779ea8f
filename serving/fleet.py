"""Which versions of worlds run: from the registry's aliases to deployments, and back when the last player has left.

    registry or home --names, aliases--> Fleet --deploys, drains--> one application per version
                                           |  ^
                                   choices v  | live sessions
                                         gateways

A promotion is noticed within seconds. The new version is deployed beside the old one and takes new sessions when it is
ready; the old one is taken down when its last session has ended. For a session that comes back later it is started.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from typing_extensions import override

from infra.artifact import RECORD, Artifact, resolve
from infra.config import Home, UserError
from infra.registry import CANDIDATE, CHAMPION, Registry, open_registry
from serving.config import ServeConfig
from serving.protocol import ModelInfo, ModelUnavailable, Prompted, StepJob, Stepped
from serving.remote import RemoteModel, apart
from serving.replica import application_name, reference_of, world_application
from serving.worlds import Choice, Worlds, card

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the fleet looks at the registry, and gateways at the fleet."""
LEASE_S = 15.0
"""What a gateway said of its live sessions counts for this long."""
AWAY = (RayError, RayServeException, UserError, OSError)
"""What a look may fail with that the next one need not."""


@dataclass(frozen=True, kw_only=True)
class View:
    """What gateways need to know."""

    choices: dict[str, Choice]
    """By the name that a client gives, the default first."""
    running: dict[str, Path]
    """Versions with a deployment, and their folders."""


class Catalogue:
    """What the configured names mean now; with the registry away, or an alias gone, what they meant before.

    Args:
        config: names, canary share, registry.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config, self.home = config, Home(config.home)
        self._registry: Registry | None = None
        self._choices: dict[str, Choice] = {}
        self._paths: dict[str, Path] = {}

    def look(self) -> dict[str, Choice]:
        """Each name's champion and candidate.

        Raises:
            UserError: a world is missing or damaged, or the registry is away at the first look.
        """
        for name in self.config.worlds:
            try:
                self._choices[name] = self._choice(name)
            except UserError as error:
                if name not in self._choices:
                    raise
                log.warning("fleet: %s", error)
        return dict(self._choices)

    def path(self, reference: str) -> Path:
        """The folder of a version, fetched where the home lacks it, every file verified once.

        Raises:
            UserError: it is missing or damaged.
        """
        if reference not in self._paths:
            self._paths[reference] = self._artifact(reference).path
        return self._paths[reference]

    def folder(self, reference: str) -> Path:
        """The folder of a version that runs, and so was verified when it was started."""
        return self._paths.get(reference) or self.home.artifacts / reference.replace("@", "/")

    def _choice(self, name: str) -> Choice:
        base, _, wanted = name.partition("@")
        folder = (Path(name) / RECORD).is_file()
        if folder or wanted.removeprefix("v").isdigit():
            return self._fixed(name, name if folder else f"{base}@v{wanted.removeprefix('v')}")
        registry = self._open()
        aliases = registry.aliases(base) if registry else {}
        if wanted and wanted not in aliases:
            there = ", ".join(f"{base}@{alias}" for alias in sorted(aliases)) or "no alias of that name"
            raise UserError(
                f"--world {name}: the registry has {there}; promote a version, or name one such as {base}@v1"
            )
        if not wanted and CHAMPION not in aliases:
            return self._fixed(name, name)
        candidate = aliases.get(CANDIDATE) if self.config.canary and not wanted else None
        return Choice(champion=aliases[wanted or CHAMPION], candidate=candidate, share=self.config.canary)

    def _fixed(self, name: str, reference: str) -> Choice:
        """Without an alias, what a name meant at the start."""
        if name in self._choices:
            return self._choices[name]
        found = self._artifact(reference)
        self._paths[found.reference] = found.path
        return Choice(champion=found.reference)

    def _artifact(self, reference: str) -> Artifact:
        name, _, version = reference.partition("@")
        if version and not (self.home.artifacts / name / version).exists() and (registry := self._open()):
            return registry.fetch(reference)
        return resolve(self.home, reference, kind="world")

    def _open(self) -> Registry | None:
        if self._registry is None:
            self._registry = open_registry(self.config.tracking, self.home)
        return self._registry


class Fleet:
    """The deployment that starts and ends versions; one replica. What runs is read from Serve, so it may die."""

    async def __init__(self, config: ServeConfig) -> None:
        self.config, self.catalogue = config, Catalogue(config)
        self._view = View(choices={}, running={})
        self._live: dict[str, tuple[float, Mapping[str, int]]] = {}
        self._needed_at: dict[str, float] = {}
        self._ready: set[str] = set()
        self._failed: set[str] = set()
        self._looking = asyncio.Lock()
        await self._look()
        self._task = asyncio.create_task(self._keep_looking())

    async def view(self, gateway: str, live: Mapping[str, int]) -> View:
        """What a gateway may offer.

        Args:
            gateway: its name.
            live: how many sessions of each version are being played through it.
        """
        self._live[gateway] = time.monotonic(), live
        return self._view

    async def wake(self, reference: str) -> None:
        """Starts a version that a session needs."""
        self._needed_at[reference] = time.monotonic()
        if not self._looking.locked():
            await self._look()

    def check_health(self) -> None:
        """Has Serve replace the replica when it looks no more."""
        if self._task.done():
            raise RuntimeError("the fleet's watch has ended")

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
            except AWAY as error:
                log.warning("fleet: %s", error)

    async def _look(self) -> None:
        async with self._looking:
            wanted = await asyncio.to_thread(self.catalogue.look)
            states = await asyncio.to_thread(_states)
            needed = self._needed({r for choice in wanted.values() for r in choice.references})
            await asyncio.to_thread(self._deploy, needed, set(states))
            # While one scales, Serve says DEPLOYING of it; what has once been ready stays so until it is taken down.
            self._ready = {r for r in needed if states.get(r) == "RUNNING" or (r in states and r in self._ready)}
            choices = {name: self._settled(name, choice, self._ready) for name, choice in wanted.items()}
            self._view = View(choices=choices, running={r: self.catalogue.folder(r) for r in sorted(self._ready)})
            failed = {r for r in needed if states.get(r) == "DEPLOY_FAILED"}
            for reference in sorted(failed - self._failed):
                log.error("fleet: %s does not start; what new sessions got before, they go on getting", reference)
            self._failed = failed

    def _needed(self, chosen: set[str]) -> set[str]:
        """Versions that new sessions get or that are played, and those that were a short while ago."""
        now = time.monotonic()
        self._needed_at |= dict.fromkeys(chosen | self._played(now), now)
        return {r for r, at in self._needed_at.items() if now - at <= self.config.drain_s}

    def _deploy(self, needed: set[str], deployed: set[str]) -> None:
        """Starts what is missing and takes down what nobody needs."""
        for reference in sorted(needed - deployed):
            self._start(reference)
        for reference in sorted(deployed - needed):
            log.info("fleet: %s has no sessions left: taken down", reference)
            serve.delete(application_name(reference), False)

    def _played(self, now: float) -> set[str]:
        """Versions with live sessions, as far as living gateways have said."""
        self._live = {name: said for name, said in self._live.items() if now - said[0] < LEASE_S}
        return {r for _, live in self._live.values() for r, count in live.items() if count}

    def _settled(self, name: str, wanted: Choice, ready: set[str]) -> Choice:
        """A choice of versions that are ready: until a new champion is, the old one goes on taking new sessions."""
        held = self._view.choices.get(name)
        champion = wanted.champion if wanted.champion in ready or held is None else held.champion
        candidate = wanted.candidate if wanted.candidate in ready else None
        if held is None or held.champion != champion:
            log.info("fleet: new sessions of %s get %s", name, champion)
        return Choice(champion=champion, candidate=candidate, share=wanted.share)

    def _start(self, reference: str) -> None:
        """Deploys a version; one that is damaged is told of, and the others go on."""
        log.info("fleet: starting %s", reference)
        try:
            path = self.catalogue.path(reference)
        except UserError as error:
            log.error("fleet: %s can't be started: %s", reference, error)
            return
        serve.run_many(
            targets(self.config, {reference: path}),
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )


class FleetWorlds(Worlds):
    """The worlds of a gateway as the fleet tells them.

    Args:
        config: the application's settings.
        fleet: handle of the fleet.
        name: this gateway's.
    """

    def __init__(self, config: ServeConfig, fleet: DeploymentHandle[Any], name: str) -> None:
        super().__init__({}, {})
        self.config, self._fleet, self._name = config, fleet, name
        self._home = Home(config.home)

    async def refresh(self, live: Mapping[str, int]) -> None:
        """Tells the fleet what is played here, and takes over what runs."""
        view: View = await self._fleet.view.remote(self._name, dict(live))
        for reference, path in view.running.items():
            if not isinstance(self._models.get(reference), RemoteModel):
                name = application_name(reference)
                handle = await asyncio.to_thread(serve.get_deployment_handle, name, name)
                model = RemoteModel(handle, card(reference, path), may_sleep=not self.config.replicas)
                self.add(reference, model, path / "prompts")
        for reference, model in list(self._models.items()):
            if reference not in view.running and isinstance(model, RemoteModel):
                self._models[reference] = Sleeping(model.info, self._fleet)
        known = [r for choice in view.choices.values() for r in choice.references if r in self]
        self.choices = {n: c for n, c in view.choices.items() if c.champion in known}

    @override
    def __contains__(self, reference: str) -> bool:
        """Whether it is there, or can be started: a version of a served name that the home still has."""
        name, _, version = reference.partition("@")
        if not super().__contains__(reference) and name in {w.partition("@")[0] for w in self.config.worlds}:
            path = self._home.artifacts / name / version
            if (path / "world.json").exists():
                self.add(reference, Sleeping(card(reference, path), self._fleet), path / "prompts")
        return super().__contains__(reference)


class Sleeping:
    """A version without a deployment: whatever is asked of it has the fleet start it. A `serving.protocol.Model`."""

    def __init__(self, info: ModelInfo, fleet: DeploymentHandle[Any]) -> None:
        self.info, self._fleet = info, fleet

    async def ready(self) -> bool:
        """It is not."""
        return False

    async def prompt(self, frames_THWC: np.ndarray) -> Prompted:
        """See `serving.protocol.Model`."""
        raise await self._wake()

    async def step(self, job: StepJob) -> Stepped | None:
        """See `serving.protocol.Model`."""
        raise await self._wake()

    async def forget(self, session: str) -> None:
        """There is nothing to forget."""

    async def _wake(self) -> ModelUnavailable:
        try:
            await apart(self._fleet.wake.remote, self.info.reference)
        except AWAY as error:
            return ModelUnavailable(str(error))
        return ModelUnavailable(f"{self.info.reference} is being started")


def targets(config: ServeConfig, worlds: Mapping[str, Path]) -> list[serve.RunTarget]:
    """Versions of worlds (folders by reference) to deploy, each as an application of its own."""
    return [
        serve.RunTarget(world_application(config, reference, path), application_name(reference), route_prefix=None)
        for reference, path in worlds.items()
    ]


def _states() -> dict[str, str]:
    """Status of every version that has an application."""
    named = {reference_of(name): app.status.value for name, app in serve.status().applications.items()}
    return {r: state for r, state in named.items() if r is not None and state != "DELETING"}
