"""Runs trainings in two plain torch processes, without Ray: numerics without the rest."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from dataclasses import replace

import numpy as np

from models.config import PolicyConfig, TransformerConfig
from pipelines.checkpoints import Checkpoints
from pipelines.jobs import plan_job
from pipelines.presets import tiny_world
from pipelines.train_config import FeedConfig, OptimizerConfig, TrainConfig

FEED = FeedConfig(windows_per_clip=2, clips_per_group=3)
OPTIMIZER = OptimizerConfig(lr=1e-3, final_lr=1e-4, warmup_steps=2)
POLICY = PolicyConfig(
    patch=16, frames=3, transformer=TransformerConfig(layers=2, width=32, heads=4, head_size=8, window=3)
)
STAGES = ("tokenizer", "actions", "dynamics", "world", "policy")
EACH = [(STAGES[seed % 5], 1 + seed % 3, seed) for seed in range(15)]
"""Every stage at ZeRO 1, 2 and 3, each with a seed of its own."""


def config(home, **changes):
    """A training of seconds."""
    base = TrainConfig(home=home.path, dataset="toys", model=tiny_world(), policy=POLICY, steps=6, batch=8,
                       micro_batch=4, feed=FEED, optimizer=OPTIMIZER, log_every=1, picture_every=0, workers=0,
                       checkpoint_every=2)  # fmt: skip
    return replace(base, **changes)


def losses(folder, name="loss"):
    """The loss of each step from a training's journal; of a step taken twice, the later."""
    lines = map(json.loads, (folder / "progress.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if "step" in line}


class Until(RuntimeError):
    """All ranks stop here at once, as if the machine had gone: what was not in a checkpoint is lost."""


def run_ranks(work, world=2):
    """Each (configuration, step to die in or None) in turn, in `world` processes; raises what a rank raises."""
    ranks, said = _started(work, world)
    for process in ranks:
        process.join(600)
        process.kill()
    faults = [said.get() for _ in iter(said.empty, True)]
    assert not faults and all(p.exitcode == 0 for p in ranks), faults or [p.exitcode for p in ranks]


def _started(work, world):
    """Processes that have imported what they need: they come from a server that has."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "pipelines.loop", "pipelines.train", "pipelines.zero"])
    said = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, world, port, work, said)) for rank in range(world)]
    for process in ranks:
        process.start()
    return ranks, said


def killed(settings, seed, lives=2, world=2):
    """A training whose processes are killed with SIGKILL at random moments, one first or all at once; then goes on.

    Returns the steps from which it went on.
    """
    rng = random.Random(seed)
    journal = plan_job(settings).folder / "progress.jsonl"
    for step in sorted(rng.sample(range(1, settings.steps), lives)):
        before = journal.stat().st_size if journal.exists() else 0
        ranks, _ = _started([(settings, None)], world)
        until = time.monotonic() + 300
        while not _told(journal, before, step):  # in this life: the one before may have come further
            assert time.monotonic() < until and all(process.is_alive() for process in ranks)
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        victims = rng.choice([ranks, [rng.choice(ranks)]])
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(rng.uniform(0, 0.5))  # then the others are ended, as Ray Train does
        for process in ranks:
            process.kill()
            process.join()
    run_ranks([(settings, None)], world)
    return [line["at"] for line in map(json.loads, journal.read_text().splitlines()) if "pid" in line]


def _told(journal, since, step):
    """Whether the journal tells of the step, or of one after it, from a place in the file on."""
    lines = journal.read_text()[since:].splitlines() if journal.exists() else []
    return any(json.loads(line).get("step", -1) >= step for line in lines if line.endswith("}"))


LOUD = (18, 20)
"""Steps whose frames are noise, in trainings that watch for spikes."""


def _dying(batches, settings, until, step, per_step):
    for n, batch in enumerate(batches):
        if until is not None and step + n / per_step > until:
            raise Until
        if settings.spike_factor and step + n // per_step in LOUD:
            noise = np.random.default_rng(int(batch["sample"][0]))
            batch["frames"] = noise.integers(0, 256, batch["frames"].shape, np.uint8)
        yield batch


def _assert_alike(engine):
    """Buffers, such as codebooks, are not averaged by anyone: each rank must have come to the same."""
    import torch.distributed as dist

    sums = {name: float(value.double().sum()) for name, value in engine.model.named_buffers() if value.numel()}
    others = [None] * engine.world
    dist.all_gather_object(others, sums)
    assert all(other == sums for other in others), "buffers differ between ranks"


def _rank(rank, world, port, work, said):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    import torch
    import torch.distributed as dist

    from pipelines.feed import local_batches
    from pipelines.loop import Loop
    from pipelines.stages import build
    from pipelines.train import starting_step
    from pipelines.zero import ZeroEngine

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for settings, until in work:
            job = plan_job(settings)
            job.folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                starting_step(job)
            dist.barrier()
            found = Checkpoints(job.folder, settings.keep).chosen()
            engine = ZeroEngine(build(job), settings, job.folder, found[1] if found else None)
            step = found[1]["step"] if found else 0
            batches = local_batches(job.source, job.schedule(), step, engine.data_rank, engine.data_world)
            per_step = settings.batch // settings.micro_batch // engine.data_world
            dying = _dying(batches, settings, until, step, per_step)
            with contextlib.suppress(Until):
                Loop(job, engine, dying).run()
            _assert_alike(engine)
    except Exception as error:
        said.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
