"""What serving costs over calling the model: ratios from one run. `python tests/benchmarks/bench_serve.py`

The same tiny world, players at once who press as fast as frames come:
    engine     `Engine.step` in this process, nothing around it
    one by one the same with one slot: no batching
    uvicorn    doors, sessions, journal, JPEG and sockets on plain uvicorn, engine in the process
    colocated  the same inside one Ray Serve replica
    two tiers  gateway replica -> model replica on Ray Serve
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from infra.config import ClusterConfig
from serving.app import serve_world
from serving.bench import measure
from serving.config import BenchConfig, Limits, ServeConfig
from serving.engine import Engine
from serving.protocol import Context, StepJob
from tests.serving.conftest import SAMPLER, SIZE, gateway_of, publish_toy, tiny_world

SESSIONS = (1, 8, 32)
FREE = Limits(steps_per_s=1e6, messages_per_s=1e6, creates_per_min=10**6)
STEPS = 60


async def call_engine(engine, sessions, steps):
    """Frames per second of `sessions` callers of the engine itself."""
    prompted = await engine.prompt(np.zeros((1, SIZE, SIZE, 3), np.uint8))

    async def play(name):
        context = Context(tokens_TN=prompted.tokens_TN, actions_T=prompted.actions_T)
        for step in range(1, steps + 1):
            job = StepJob(session=name, seed=1, step=step, action=step % 5, context=context)
            done = await engine.step(job)
            assert done is not None
            context = None

    names = [f"{time.monotonic_ns()}-{i}" for i in range(sessions)]
    began = time.perf_counter()
    await asyncio.gather(*(play(name) for name in names))
    took_s = time.perf_counter() - began
    for name in names:
        await engine.forget(name)
    return sessions * steps / took_s


def call_server(url, sessions):
    """Frames per second of players over sockets."""
    return asyncio.run(measure(BenchConfig(url=url, sessions=sessions, steps=STEPS, rate_fps=0))).frames_per_s


def main():
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        world = tiny_world()
        home = publish_toy(world, Path(folder))
        for name, slots in (("engine", 32), ("one by one", 1)):
            engine = Engine(world, reference="toy@v1", sampler=SAMPLER, slots=slots)
            engine.warm_up()
            many = SESSIONS if slots > 1 else (1,)
            rates[name] = {n: asyncio.run(call_engine(engine, n, STEPS)) for n in many}
            engine.close()
        engine = Engine(world, reference="toy@v1", sampler=SAMPLER, slots=32)
        with gateway_of(home, engine, Path(folder) / "sessions.db", limits=FREE) as url:
            rates["uvicorn"] = {n: call_server(url, n) for n in SESSIONS}
        engine.close()
        for name, colocated in (("colocated", True), ("two tiers", False)):
            config = ServeConfig(
                home=home.path, world="toy", port=0, slots=32, sampler=SAMPLER, limits=FREE, colocated=colocated,
                cluster=ClusterConfig(cpus=4),
            )  # fmt: skip
            with serve_world(config) as served:
                rates[name] = {n: call_server(served.url, n) for n in SESSIONS}
    sys.stdout.write(table(rates))


def table(rates):
    """Frames per second, and each row against the one that it should be close to."""
    lines = [f"{'frames/s at':12}" + "".join(f"{n:>10}" for n in SESSIONS) + "  sessions"]
    for name, row in rates.items():
        lines.append(f"{name:12}" + "".join(f"{row[n]:10.1f}" if n in row else " " * 10 for n in SESSIONS))
    batching = rates["engine"][8] / rates["one by one"][1]
    ratios = {
        "batching, 8 sessions over one by one": batching,
        "colocated over uvicorn, 32 sessions": rates["colocated"][32] / rates["uvicorn"][32],
        "two tiers over uvicorn, 32 sessions": rates["two tiers"][32] / rates["uvicorn"][32],
        "two tiers over engine, 1 session": rates["two tiers"][1] / rates["engine"][1],
    }
    return "\n".join([*lines, *(f"{name:40} {value:6.2f}" for name, value in ratios.items())]) + "\n"


if __name__ == "__main__":
    main()
