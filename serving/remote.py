"""A world in `WorldModel` replicas, as a gateway sees it: steps of many sessions travel in few calls.

A call to a replica costs about as much as a small step. A session's first step goes out alone, and its router decides
which replica that is; after that the steps of sessions that live on one replica share calls. While none of them is on
its way a step leaves at once; while some are, it waits at most `LINGER_S` for company.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serving.protocol import ModelInfo, ModelUnavailable, Prompted, StepJob, Stepped
from serving.router import PLACE_AGAIN

UNAVAILABLE = (RayActorError, BackPressureError, DeploymentUnavailableError)
LINGER_S = 0.002
"""Longest wait of a step for others that share its call."""
FREE_CALLS = 2
"""Calls to one replica on their way at which steps begin to wait for each other."""
REMEMBERED = 4096
"""Sessions whose replica is remembered; a forgotten one's next step goes out alone."""
Handle = DeploymentHandle[Any]


class RemoteModel:
    """A world that runs in `WorldModel` replicas. Implements `serving.protocol.Model`.

    Calls carry a session id, which the router keeps on one replica as long as it lives.
    """

    def __init__(self, handle: Handle, info: ModelInfo, may_sleep: bool = False) -> None:
        self.info, self._handle, self._may_sleep = info, handle, may_sleep
        self._homes: OrderedDict[str, str] = OrderedDict()
        self._lanes: dict[str, _Lane] = {}

    async def ready(self) -> bool:
        """Whether a replica answers; one that may sleep isn't woken for the question."""
        if self._may_sleep:
            return True
        try:
            return await self._handle.info.remote() == self.info
        except UNAVAILABLE:
            return False

    async def prompt(self, frames_THWC: np.ndarray) -> Prompted:
        """Tokens of prompt frames, by any replica."""
        try:
            return await apart(self._handle.prompt.remote, frames_THWC)
        except UNAVAILABLE as error:
            raise ModelUnavailable(str(error)) from error

    async def step(self, job: StepJob) -> Stepped | None:
        """The next frame, by the session's replica; Serve itself never repeats a call that died with its replica."""
        home = self._homes.get(job.session)
        try:
            if home is None or job.context is not None:
                key = job.session + (PLACE_AGAIN if job.context is not None else "")
                home, done = await apart(self._handle.options(session_id=key).step.remote, job)
                self._settle(job.session, home if done is not None else None)
                return done
            lane = self._lanes.setdefault(home, _Lane(self._handle))
            done = await lane.step(job)
        except asyncio.CancelledError:  # it took too long: the next try asks the router again
            self._settle(job.session, None)
            raise
        except UNAVAILABLE as error:
            self._settle(job.session, None)
            raise ModelUnavailable(str(error)) from error
        if done is None:
            self._settle(job.session, None)
        return done

    async def forget(self, session: str) -> None:
        """Frees the session's slot, if a replica has it."""
        self._settle(session, None)
        with suppress(*UNAVAILABLE):
            await apart(self._handle.options(session_id=session).forget.remote, session)

    def _settle(self, session: str, home: str | None) -> None:
        """Remembers which replica holds a session, or forgets it."""
        self._homes.pop(session, None)
        if home is not None:
            self._homes[session] = home
            if len(self._homes) > REMEMBERED:
                self._homes.popitem(last=False)
        if len(self._lanes) > 2 * len(set(self._homes.values())):
            living = set(self._homes.values())
            self._lanes = {name: lane for name, lane in self._lanes.items() if name in living or lane.calls}


class _Lane:
    """Steps on their way to one replica. They are routed by the first one's session: all live where it lives."""

    def __init__(self, handle: Handle) -> None:
        self._handle, self.calls = handle, 0
        self._waiting: list[tuple[StepJob, asyncio.Future[Stepped | None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def step(self, job: StepJob) -> Stepped | None:
        """The step's outcome, as it comes back with others."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Stepped | None] = loop.create_future()
        self._waiting.append((job, future))
        if self._timer is None:
            self._timer = loop.call_later(LINGER_S if self.calls >= FREE_CALLS else 0, self._send)
        return await future

    def _send(self) -> None:
        """What waits leaves in one call."""
        self._timer = None
        batch = [(job, future) for job, future in self._waiting if not future.done()]
        self._waiting.clear()
        if batch:
            self.calls += 1
            task = asyncio.create_task(self._call(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _call(self, batch: list[tuple[StepJob, "asyncio.Future[Stepped | None]"]]) -> None:
        jobs = [job for job, _ in batch]
        try:
            stream = apart(self._handle.options(session_id=jobs[0].session, stream=True).steps.remote, jobs)
            async for answers in stream:
                for index, answer in answers:
                    _resolve(batch[index][1], answer)
        except Exception as error:  # noqa: BLE001 whatever ended the call ended every step that it still carried
            for _, future in batch:
                _resolve(future, error)
        finally:
            self.calls -= 1
            for _, future in batch:
                _resolve(future, ModelUnavailable("the replica ended the call without an answer"))
            if self._timer is not None and self.calls < FREE_CALLS:
                self._timer.cancel()
                self._send()


def apart(remote: Callable[[Any], Any], argument: Any) -> Any:
    """A call that Serve does not count to the request which asked for it.

    Calls of one request carry its id, and of two that wait for a replica at once Serve 2.60 leaves the second waiting
    for ever (`RequestRouter._add_pending_request_to_indices`).
    """
    return Context().run(remote, argument)


def _resolve(future: "asyncio.Future[Stepped | None]", answer: Stepped | Exception | None) -> None:
    """Hands an answer to who still waits for it."""
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
