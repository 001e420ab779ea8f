"""Runs trainings in two plain torch processes, without Ray: numerics without the rest."""

import json
import multiprocessing
import os
import socket
from dataclasses import replace

from pipelines.checkpoints import Checkpoints
from pipelines.config import FeedConfig, OptimizerConfig, TrainConfig
from pipelines.presets import tiny_world

FEED = FeedConfig(windows_per_clip=2, clips_per_group=3)
OPTIMIZER = OptimizerConfig(lr=1e-3, final_lr=1e-4, warmup_steps=2)


def config(home, **changes):
    """A training of seconds."""
    base = TrainConfig(home=home.path, dataset="toys", model=tiny_world(), steps=6, batch=8, micro_batch=4, feed=FEED,
                       optimizer=OPTIMIZER, log_every=1, picture_every=0, workers=0, checkpoint_every=2)  # fmt: skip
    return replace(base, **changes)


def losses(folder, name="loss"):
    """The loss of each step from a training's journal; of a step taken twice, the later."""
    lines = map(json.loads, (folder / "progress.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if "step" in line}


def run_ranks(configs, world=2):
    """Each configuration in turn, in the same `world` processes; raises what a rank raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, world, port, configs, said)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
    faults = [said.get() for _ in iter(said.empty, True)]
    assert not faults and all(p.exitcode == 0 for p in ranks), faults or [p.exitcode for p in ranks]


def _rank(rank, world, port, configs, said):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}  # fmt: skip
    import torch
    import torch.distributed as dist

    from pipelines.feed import local_batches
    from pipelines.loop import Loop
    from pipelines.stages import build, plan_job
    from pipelines.train import starting_step
    from pipelines.zero import ZeroEngine

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for settings in configs:
            job = plan_job(settings)
            job.folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                starting_step(job)
            dist.barrier()
            found = Checkpoints(job.folder, settings.keep).chosen()
            engine = ZeroEngine(build(job), settings, job.folder, found[1] if found else None)
            step = found[1]["step"] if found else 0
            Loop(job, engine, local_batches(job.source, job.schedule(), step, rank, world)).run()
    except Exception as error:
        said.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
