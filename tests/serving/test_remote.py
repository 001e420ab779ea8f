"""Steps on their way from a gateway to replicas: many in few calls, each with its own outcome."""

import asyncio
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from ray import serve

from serving.protocol import ModelInfo, ModelUnavailable, StepJob, Stepped
from serving.remote import RemoteModel

INFO = ModelInfo(reference="count@v1", actions=4, height_px=2, width_px=2, fps=10.0, prompt_frames=1)
LOST, BROKEN = "lost", "broken"


@serve.deployment(max_ongoing_requests=1024, health_check_period_s=1)
class Counting:
    """Speaks as `WorldModel` does: tokens say which job a step was, calls are counted and take a moment."""

    def __init__(self):
        self.calls = 0

    async def seen(self):
        return self.calls, os.getpid()

    async def step(self, job):
        self.calls += 1
        return "here", self._done(job)

    async def steps(self, jobs):
        self.calls += 1
        await asyncio.sleep(0.02)
        half = len(jobs) // 2
        for part in (range(half), range(half, len(jobs))):
            await asyncio.sleep(0.01)
            if part:
                yield [(i, self._done(jobs[i])) for i in part]

    async def forget(self, session):
        self.calls += 1

    def _done(self, job):
        if job.session == LOST and job.context is None and job.step > 1:
            return None
        if job.session == BROKEN and job.step > 1:
            return ValueError(f"{job.session} at {job.step}")
        tokens = np.array([hash_of(job)], np.uint16)
        return Stepped(tokens_N=tokens, frame_HWC=np.zeros((2, 2, 3), np.uint8), context=1, queue_s=0.0, model_s=0.0)


def hash_of(job):
    return sum(job.session.encode()) * 31 + job.step


def job(session, step):
    return StepJob(session=session, seed=0, step=step, action=0)


@pytest.fixture
def handle(served):
    """A handle in a running Serve."""
    yield serve.run(Counting.bind(), name="counting", route_prefix=None)
    serve.delete("counting")


async def play(model, session, steps):
    for step in range(1, steps + 1):
        done = await model.step(job(session, step))
        assert done.tokens_N[0] == hash_of(job(session, step)), "everybody gets the own frame"


def test_steps_of_many_sessions_share_calls(handle):
    async def crowd():
        model = RemoteModel(handle, INFO)
        await asyncio.gather(*(play(model, f"s{i}", 20) for i in range(24)))
        return await handle.seen.remote()

    calls, _ = asyncio.run(crowd())
    assert calls < 0.7 * 24 * 20, "fewer calls than steps"


def test_what_fails_or_is_lost_is_its_own_affair(handle):
    async def crowd():
        model = RemoteModel(handle, INFO)
        for name in (LOST, BROKEN, "fine"):
            await model.step(job(name, 1))
        lost, broken, fine = await asyncio.gather(
            *(model.step(job(name, 2)) for name in (LOST, BROKEN, "fine")), return_exceptions=True
        )
        assert lost is None
        assert isinstance(broken, ValueError)
        assert fine.tokens_N[0] == hash_of(job("fine", 2))
        context = replace(job(LOST, 2), context=np.zeros(1))
        assert (await model.step(context)).tokens_N[0] == hash_of(job(LOST, 2))
        await model.forget("fine")

    asyncio.run(crowd())


def test_a_killed_replica_ends_every_step_on_its_way(handle):
    async def crowd():
        model = RemoteModel(handle, INFO)
        names = [f"s{i}" for i in range(8)]
        for name in names:
            await model.step(job(name, 1))
        _, pid = await handle.seen.remote()
        under_way = [asyncio.ensure_future(model.step(job(name, 2))) for name in names]
        await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        outcomes = await asyncio.wait_for(asyncio.gather(*under_way, return_exceptions=True), 60)
        assert all(isinstance(o, (ModelUnavailable, Stepped)) for o in outcomes), outcomes
        assert any(isinstance(o, ModelUnavailable) for o in outcomes)

    asyncio.run(crowd())
