"""What training costs beside plain torch: python tests/benchmarks/bench_train.py [step] [small] [save]

`step`: `lampworks train` on Ray Train with ZeRO-1 and two workers against DDP in two plain processes, which hold their
batches in memory. Both live all the time and take turns of a few seconds (the other's workers are stopped), so that
what else the machine does falls on both; the median of the turns' ratios counts. A worker holds 4096 tokens, as in the
demo and in one window of `coinrun`; `small` is the same with 1024, where what a step costs at least shows. `save`:
what a checkpoint takes from the steps, on the tokenizer of the `coinrun` preset.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from infra.cluster import connect
from infra.config import Home
from models.config import WorldConfig
from pipelines.paper import coinrun_world
from pipelines.train import Interrupted, train
from pipelines.train_config import FeedConfig, OptimizerConfig, TrainConfig
from tests.pipelines.clips import write_dataset

TURNS, TURN_S, WARM_STEPS = 10, 10.0, 12
TOLD_EVERY = 3
"""Steps between two lines of our journal; by default 20, which a turn is too short for."""
RAY_NICENESS = 15
"""Ray's workers run with it; the plain processes too, so that what else the machine does holds up both alike."""
FEED = FeedConfig(windows_per_clip=8, clips_per_group=4)


def config(home: Home, model: WorldConfig, windows: int = 1, **changes) -> TrainConfig:
    """A tokenizer on two workers with so many windows each."""
    return TrainConfig(home=home.path, dataset="toys", model=model, batch=2 * windows, micro_batch=windows, feed=FEED,
                       workers=2, optimizer=OptimizerConfig(warmup_steps=2), picture_every=0, **changes)  # fmt: skip


def smaller_world() -> WorldConfig:
    """The tokenizer of `coinrun` with a quarter of its tokens, half of its width and half of its layers."""
    world = coinrun_world()
    part = replace(world.tokenizer.encoder, layers=4, width=256, heads=4)
    tokenizer = replace(world.tokenizer, patch=8, encoder=part, decoder=part)
    return replace(world, tokenizer=tokenizer, dynamics=replace(world.dynamics, rows=8, columns=8))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def plain_rank(rank: int, port: int, settings: TrainConfig, path: Path) -> None:
    """DDP as its tutorial writes it, until it is killed; tells of each step as the journal does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    from pipelines.feed import local_batches
    from pipelines.jobs import plan_job
    from pipelines.stages import build
    from pipelines.zero import parameter_groups

    os.nice(RAY_NICENESS)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = plan_job(settings)
    model = build(job).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.optimizer), settings.optimizer.lr, (0.9, 0.9), fused=True
    )
    rows = list(local_batches(job.source, replace(job.schedule(), steps=4), 0, rank, 2))
    batches = [{name: torch.from_numpy(row[name]) for name in ("frames", "key")} for row in rows]
    for step in itertools.count():
        began = time.perf_counter()
        model.begin_step(step, settings.steps)
        loss, _ = wrapped(batches[step % len(batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.end_step()
        if rank == 0:
            line = {"step": step + 1, "time_s": time.time(), "step_s": time.perf_counter() - began}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def steps_of(path: Path) -> list[dict[str, float]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if "step" in line]


def signal_all(processes: Sequence[psutil.Process], what: int) -> None:
    for process in processes:
        process.send_signal(what)


def take_turns(ours: Sequence[psutil.Process], plain: Sequence[psutil.Process]) -> list[tuple[str, float, float]]:
    """(who, from, until) of each turn."""
    turns: list[tuple[str, float, float]] = []
    for _ in range(TURNS):
        for who, runs, rests in (("ours", ours, plain), ("plain", plain, ours)):
            signal_all(rests, signal.SIGSTOP)
            signal_all(runs, signal.SIGCONT)
            began = time.time()
            time.sleep(TURN_S)
            turns.append((who, began, time.time()))
    signal_all(ours, signal.SIGCONT)
    return turns


def within(steps: list[dict[str, float]], each: int, began: float, ended: float) -> list[dict[str, float]]:
    """The lines, each of so many steps, that lie in a turn whole."""
    return [s for s in steps if s["time_s"] - each * s["step_s"] >= began and s["time_s"] <= ended]


def train_until_stopped(settings: TrainConfig) -> None:
    with contextlib.suppress(Interrupted):
        train(settings)


def small(home: Home) -> None:
    step(home, windows=1)


def step(home: Home, windows: int = 4) -> None:
    from pipelines.jobs import plan_job

    settings = config(home, smaller_world(), windows, steps=3000, log_every=TOLD_EVERY,
                      checkpoint_every=10**6, name="step")  # fmt: skip
    folder, told, port = plan_job(settings).folder, home.path / "plain.jsonl", free_port()
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=plain_rank, args=(rank, port, settings, told)) for rank in range(2)]
    training = threading.Thread(target=train_until_stopped, args=(settings,))
    for started in (*ranks, training):
        started.start()
    for path in (told, folder / "progress.jsonl"):
        while max((s["step"] for s in steps_of(path)), default=0) < WARM_STEPS:
            time.sleep(0.5)
    below = psutil.Process().children(recursive=True)
    workers = [p for p in below if "RayTrainWorker" in "".join(p.cmdline())]
    turns = take_turns(workers, [psutil.Process(rank.pid) for rank in ranks])
    (folder / "stop").touch()
    for rank in ranks:
        rank.kill()
    training.join()
    whole, bare = steps_of(folder / "progress.jsonl"), steps_of(told)
    found = {"ours": (whole, TOLD_EVERY), "plain": (bare, 1)}
    taken = [[s["step_s"] for s in within(*found[who], *turn)] for who, *turn in turns]
    pairs = [pair for pair in zip(taken[::2], taken[1::2], strict=True) if all(pair)]
    ratios = [statistics.median(one) / statistics.median(other) for one, other in pairs]
    own = [s for who, *turn in turns if who == "ours" for s in within(whole, TOLD_EVERY, *turn)]
    wait = statistics.median(s["data_wait_s"] / s["step_s"] for s in own)
    plain_ms = 1000 * statistics.median(t for _, other in pairs for t in other)
    spread = statistics.quantiles(ratios, n=4)
    sys.stdout.write(
        f"plain DDP {plain_ms:.0f} ms a step of {2 * windows} windows, {len(workers)} workers, "
        f"{TOLD_EVERY * len(own)} steps of ours in {len(pairs)} turns\n"
        f"{statistics.median(ratios):8.3f}  Ray Train + ZeRO-1 step over plain DDP, two workers (at most 1.10; "
        f"half of the turns between {spread[0]:.3f} and {spread[2]:.3f})\n"
        f"{wait:8.3f}  share of a step that waits for data (under 0.05)\n"
    )


def save(home: Home) -> None:
    from pipelines.jobs import plan_job

    settings = config(home, coinrun_world(), steps=9, log_every=1, checkpoint_every=3, name="saved")
    train(settings)
    path = plan_job(settings).folder / "progress.jsonl"
    records = steps_of(path)
    after = [r["step_s"] for r in records if r["step"] in (4, 7)]
    other = statistics.median(r["step_s"] for r in records if r["step"] in (3, 5, 6, 8, 9))
    held = [line["took_s"] for line in map(json.loads, path.read_text().splitlines()) if line.get("held", 9) < 9]
    sys.stdout.write(
        f"coinrun tokenizer, 2 windows a step: {other:.1f} s a step, checkpoints {held} s in the loop\n"
        f"{statistics.median(held) / other:8.3f}  a save's stall over a step (under 0.10)\n"
        f"{statistics.median(after) / other - 1:8.3f}  a step after a save over another, less one\n"
    )


def main() -> None:
    parts = [part for part in (step, small, save) if part.__name__ in sys.argv[1:] or len(sys.argv) == 1]
    with tempfile.TemporaryDirectory() as folder, connect():
        home = Home(Path(folder)).ensure()
        write_dataset(home, clips=6, frames=40, size=64)
        for part in parts:
            part(home)


if __name__ == "__main__":
    main()
