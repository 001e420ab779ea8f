"""What serving costs over calling the model: ratios from one run. `python tests/benchmarks/bench_serve.py`

Two models: the tests' tiny world, and one that takes 5 ms a pass whatever the batch (160 x 90 pixels). Players at once,
each asking for a step when the last has come (tests/benchmarks/players.py), against:
    engine      `Engine.step` in one process, nothing around it
    one by one  the same with one slot: no batching
    uvicorn     doors, sessions, journal, JPEG and sockets on plain uvicorn, engine in the process
    colocated   the same inside one Ray Serve replica
    two tiers   gateway replica -> model replica on Ray Serve
The last two as on one machine, where the gateway has the port itself; behind Serve's default proxy; and behind its
HAProxy data plane with throughput settings (FAST). Each takes turns with plain uvicorn, which runs all the time.
Servers are processes of their own; on two cores they share them with the players, whose share of a core is printed.
"""

import asyncio
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch

from infra.artifact import publish
from infra.cluster import environment, temporary_folder
from infra.config import ClusterConfig, Home
from models.world import World
from serving.app import RAY_SETTINGS, serve_world
from serving.config import Limits, ServeConfig
from serving.engine import Engine
from serving.gateway import Gateway
from serving.protocol import Context, StepJob
from serving.store import open_store
from serving.worlds import Worlds
from tests.benchmarks.fixed import FIXED_FPS, install
from tests.benchmarks.players import median_rate, play
from tests.serving.conftest import SAMPLER, SIZE, listening, publish_toy, tiny_world

SESSIONS = (1, 8, 32)
MODELS = ("toy", "fixed")
SECONDS = 1.2
ROUNDS = 3
"""Turns of a server and of plain uvicorn at most sessions; medians count."""
FREE = Limits(steps_per_s=1e6, messages_per_s=1e6, creates_per_min=10**6)
FAST = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # nobody plays when a server ends here
}
SERVERS = {
    "colocated": ("colocated", {}),
    "two tiers": ("two-tiers", {}),
    "colocated, proxy": ("colocated-proxy", {}),
    "two tiers, proxy": ("two-tiers-proxy", {}),
    "colocated, HAProxy": ("colocated-proxy", FAST),
    "two tiers, HAProxy": ("two-tiers-proxy", FAST),
}


# -- servers, each in a process of its own ----------------------------------------------------------------------------


def serve(kind, home):
    """Serves both models until standard input ends; the URL goes to standard output."""
    install()
    config = ServeConfig(
        home=home, world=MODELS, port=0, slots=32, sampler=SAMPLER, limits=FREE,
        colocated=kind.startswith("colocated"), proxy=kind.endswith("proxy"), cluster=ClusterConfig(cpus=4),
    )  # fmt: skip
    with on_uvicorn(config) if kind == "uvicorn" else on_serve(config) as url:
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()
        sys.stdin.read()


@contextlib.contextmanager
def on_uvicorn(config):
    """The doors over engines in this process: the same application that a colocated replica holds."""
    home = Home(config.home)
    engines = {f"{name}@v1": load_engine(home.artifacts / name / "v1", 32) for name in MODELS}
    prompts = {name: home.artifacts / name.partition("@")[0] / "v1" / "prompts" for name in engines}
    app = Gateway(config, Worlds(engines, prompts), open_store(str(home.path / "uvicorn.db"))).app()
    with listening(app) as url:
        yield url


@contextlib.contextmanager
def on_serve(config):
    """`lampworks serve`, in a Ray whose processes know the fixed decoder."""
    os.environ.update({**RAY_SETTINGS, **environment()})
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _temp_dir=str(temporary_folder()), runtime_env={"worker_process_setup_hook": install},
    )  # fmt: skip
    with serve_world(config) as served:
        yield served.url
    ray.shutdown()


@contextlib.contextmanager
def running(kind, home, settings):
    """The URL of a server in a new process."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, __file__, "--serve", kind, str(home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True) as server:
        url = server.stdout.readline().strip()
        assert url.startswith("http"), f"{kind} did not start: {url}"
        yield url
        server.stdin.close()
        server.wait(60)


# -- measuring ---------------------------------------------------------------------------------------------------------


def load_engine(path, slots):
    """An engine as a replica makes it."""
    torch.set_num_threads(1)
    engine = Engine(World.load(path), reference=f"{path.parent.name}@{path.name}", sampler=SAMPLER, slots=slots)
    engine.warm_up()
    return engine


async def call_engine(engine, sessions, seconds):
    """Frames per second of `sessions` callers of the engine itself."""
    prompted = await engine.prompt(np.zeros((1, SIZE, SIZE, 3), np.uint8))
    until, times = time.perf_counter() + seconds, []

    async def play_alone(name):
        context, step = Context(tokens_TN=prompted.tokens_TN, actions_T=prompted.actions_T), 0
        while time.perf_counter() < until:
            step += 1
            job = StepJob(session=name, seed=1, step=step, action=step % 5, context=context)
            assert await engine.step(job) is not None
            context = None
            times.append(time.perf_counter())

    await asyncio.gather(*(play_alone(f"{sessions}-{i}") for i in range(sessions)))
    return median_rate(times, until - seconds, until)


def measure_engines(home):
    """Rates of the engine alone, per model: batched, and one session at a time."""
    rates = {}
    for model in MODELS:
        batched = load_engine(home.artifacts / model / "v1", 32)
        rates["engine", model] = {n: asyncio.run(call_engine(batched, n, SECONDS)) for n in SESSIONS}
        batched.close()
        single = load_engine(home.artifacts / model / "v1", 1)
        # One at a time, a device's time is all there is: eight players get an eighth of this each.
        rates["one by one", model] = {8: asyncio.run(call_engine(single, 1, SECONDS))}
        single.close()
    return rates


def main(only=()):
    """Measures everything and prints the table."""
    install()
    rates, notes = {}, []
    with tempfile.TemporaryDirectory() as folder:
        home = publish_models(Path(folder))
        rates |= measure_engines(home)
        with running("uvicorn", home.path, {}) as plain:
            for name, (kind, settings) in SERVERS.items():
                if only and name not in only:
                    continue
                with running(kind, home.path, settings) as url:
                    for model in MODELS:
                        rates[name, model], found = take_turns(url, plain, model)
                        notes.append((name, model, found))
    sys.stdout.write(table(rates, notes))


def take_turns(url, plain, model):
    """Rates of a server by sessions, and of plain uvicorn in turns at most sessions; what was seen last."""
    rates = {n: asyncio.run(play(url, model, n, SECONDS))[0] for n in SESSIONS[:-1]}
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(asyncio.run(play(plain, model, SESSIONS[-1], SECONDS)))
        ours.append(asyncio.run(play(url, model, SESSIONS[-1], SECONDS)))
    sys.stderr.write(f"{url} | {model} | ours {ours} | plain {theirs}\n")
    rates[SESSIONS[-1]], rates["plain"] = (float(np.median([r for r, _, _ in x])) for x in (ours, theirs))
    return rates, ours[-1]


def publish_models(folder):
    """A home with the tiny world twice: as itself, and as the one that the fixed decoder stands in for."""
    world = tiny_world()
    for name in MODELS:
        (folder / name).mkdir()
    home = publish_toy(world, folder / "toy")
    world.config = dataclasses.replace(world.config, fps=FIXED_FPS)
    world.save(folder / "fixed" / "world")
    shutil.copytree(home.artifacts / "toy" / "v1" / "prompts", folder / "fixed" / "world" / "prompts")
    publish(
        home, name="fixed", kind="world", source_dir=folder / "fixed" / "world", config={}, parents={}, metrics={},
        identity="fixed",
    )  # fmt: skip
    return home


def table(rates, notes):
    """Frames per second, and each row against the one that it should be close to."""
    lines = [f"{'frames/s at':26}" + "".join(f"{n:>9}" for n in (*SESSIONS, "uvicorn")) + "  latency; players' core"]
    told = {(name, model): found for name, model, found in notes}
    for (name, model), row in rates.items():
        line = f"{model:6}{name:20}" + "".join(f"{row[n]:9.0f}" if n in row else " " * 9 for n in (*SESSIONS, "plain"))
        if (name, model) in told:
            _, latency, busy = told[name, model]
            line += f"  {latency * 1e3:5.1f} ms  {busy:4.0%}"
        lines.append(line)
    lines.append("")
    for model in MODELS:

        def ratio(what, over, n, model=model):
            if (what, model) in rates and (over, model) in rates:
                share = rates[what, model][n] / rates[over, model][n]
                lines.append(f"{model:6}{f'{what} over {over}, {n} sessions':48}{share:6.2f}")

        lines.append(
            f"{model:6}{'batching: 8 sessions over one by one':48}"
            f"{rates['engine', model][8] / rates['one by one', model][8]:6.2f}"
        )
        for name in SERVERS:
            for n in SESSIONS:
                ratio(name, "engine", n)
            if (name, model) in rates:
                share = rates[name, model][32] / rates[name, model]["plain"]
                lines.append(f"{model:6}{f'{name} over plain uvicorn, 32 sessions':48}{share:6.2f}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1:])
