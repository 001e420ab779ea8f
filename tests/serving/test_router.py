"""Where sessions go on a real Ray Serve while replicas come and go, and how many replicas there are."""

import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.context import _RequestContext, _serve_request_context

from serving.protocol import StepJob
from serving.remote import RemoteModel
from serving.replica import QUIET, ROUTER, SCALING
from serving.router import PLACE_AGAIN
from serving.scaling import QUEUE, SESSIONS, DesiredReplicas
from tests.serving.conftest import MODEL


class Place:
    """Says which process it is, and reports as many sessions as a file says."""

    def __init__(self, file):
        self.file = Path(file)

    def __call__(self):
        return os.getpid()

    async def record_autoscaling_stats(self):
        return {SESSIONS: float(self.file.read_text()) / 4, QUEUE: 0.0}


@pytest.fixture
def places(served, tmp_path):
    """A handle to one to three of them, and the file."""
    file = tmp_path / "sessions"
    file.write_text("8")
    scaling = AutoscalingConfig(
        min_replicas=1, max_replicas=3, initial_replicas=2, upscale_delay_s=0, downscale_delay_s=600,
        metrics_interval_s=0.5, look_back_period_s=1.5,
        policy=AutoscalingPolicy(policy_function=SCALING, policy_kwargs={"sessions_per_replica": 2}),
    )  # fmt: skip
    deployment = serve.deployment(
        name="place", autoscaling_config=scaling, logging_config=QUIET, health_check_period_s=1,
        ray_actor_options={"num_cpus": 0.1}, request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )  # fmt: skip
    yield serve.run(deployment(Place).bind(str(file)), name="places", route_prefix=None), file
    serve.delete("places")


def where(handle, sessions, suffix=""):
    """Process id by session; a call that died with its replica is made again."""
    found = {}
    deadline = time.monotonic() + 60
    for session in sessions:
        while session not in found:
            assert time.monotonic() < deadline
            try:
                found[session] = handle.options(session_id=session + suffix).remote().result(timeout_s=30)
            except RayActorError:
                time.sleep(0.1)
    return found


def test_steps_that_one_request_asks_for_at_once_are_all_answered(served):
    """As a socket's step and the shared call that its last answer set off: Serve gives both the socket's id."""
    model = RemoteModel(serve.get_deployment_handle(MODEL, MODEL), None)

    async def ask():
        _serve_request_context.set(_RequestContext(_internal_request_id="one socket"))
        for turn in range(20):
            jobs = [StepJob(session=f"{turn}-{n}", seed=0, step=1, action=0) for n in range(8)]
            yield await asyncio.wait_for(asyncio.gather(*map(model.step, jobs)), 20)

    async def all_of_it():
        return [answer async for answers in ask() for answer in answers]

    assert asyncio.run(all_of_it()) == [None] * 160, "none of them has a cache"


def test_only_what_must_move_moves(places):
    handle, file = places
    old, new = [f"old{n}" for n in range(24)], [f"new{n}" for n in range(12)]
    first = where(handle, old)
    assert sorted(Counter(first.values()).values()) == [12, 12], "new sessions are spread evenly"
    assert where(handle, reversed(old)) == first

    file.write_text("24")  # two replicas report 24 / 4 each: six replicas' worth, the bound is three
    deadline = time.monotonic() + 60
    while len(set(where(handle, [f"probe{time.monotonic()}" for _ in range(3)]).values()) | set(first.values())) < 3:
        assert time.monotonic() < deadline, "no third replica came"
        time.sleep(0.3)
    assert where(handle, old) == first, "a replica that is added moves nothing"
    (third,) = set(where(handle, new).values()) - set(first.values())
    grown = where(handle, [*old, *new])
    assert Counter(grown.values())[third] >= 10, "what is new goes where there is room"

    moved = where(handle, old[:1], PLACE_AGAIN)
    assert moved[old[0]] == third, "a session whose cache is gone goes there too"
    assert where(handle, old[:1]) == moved, "and stays"
    now = grown | moved

    victim = now[old[-1]]
    os.kill(victim, signal.SIGKILL)
    after = where(handle, [*old, *new])
    stayed = {s: pid for s, pid in now.items() if pid != victim}
    assert {s: after[s] for s in stayed} == stayed, "a replica that is killed moves only its own"
    assert victim not in after.values()


@pytest.mark.parametrize(
    ("sessions", "waits", "running", "calls", "want"),
    [
        ([], [], 0, 0, 0),
        ([], [], 0, 1, 1),
        ([0.0], [0.0], 1, 0, 0),
        ([3.0], [0.01], 1, 3, 1),
        ([4.0, 1.0], [0.01, 0.0], 2, 5, 2),
        ([9.0], [0.02], 1, 9, 3),
        ([3.0], [0.4], 1, 3, 2),
    ],
)
def test_replicas_follow_sessions_and_their_waits(sessions, waits, running, calls, want):
    context = SimpleNamespace(
        aggregated_metrics={SESSIONS: dict(enumerate(sessions)), QUEUE: dict(enumerate(waits))},
        current_num_replicas=running,
        total_num_requests=calls,
    )
    assert DesiredReplicas(4)(context) == (want, {})
