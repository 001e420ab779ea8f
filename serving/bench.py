"""Synthetic players: how many sessions a server carries, and at what latency. `lampworks bench --sessions 8`."""

import asyncio
import logging
import sys
import time
from dataclasses import dataclass

import numpy as np

from infra.config import UserError
from serving.client import AsyncPlayer
from serving.config import BenchConfig
from serving.protocol import Problem, Timings

log = logging.getLogger(__name__)

PROMPT = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What the players saw. Latencies are from asking for a step to its decoded frame, in seconds."""

    frames_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    longest_s: float
    on_pace: int
    """Sessions whose 95th percentile keeps up with the wanted rate."""
    reconnects: int
    queue_s: float
    """Mean server times of a step, from the frames' headers."""
    model_s: float
    encode_s: float
    commit_s: float


def bench(config: BenchConfig) -> BenchResult:
    """Plays and prints one table.

    Raises:
        UserError: no server answers, or it refuses.
    """
    try:
        result = asyncio.run(measure(config))
    except Problem as error:
        raise UserError(f"{config.url} does not play: {error}: start a server with lampworks serve") from error
    sys.stdout.write(describe(config, result))
    return result


async def measure(config: BenchConfig) -> BenchResult:
    """Creates the sessions one after another, warms each up with a step, and then plays them at once."""
    players = [
        await AsyncPlayer.create(config.url, PROMPT, seed=config.seed + i, key=config.key)
        for i in range(config.sessions)
    ]
    try:
        await asyncio.gather(*(player.step(0) for player in players))
        began = time.perf_counter()
        played = await asyncio.gather(*(_play(player, config, i) for i, player in enumerate(players)))
        took_s = time.perf_counter() - began
    finally:
        await asyncio.gather(*(player.close() for player in players))
    latencies_s = np.array([latencies for latencies, _ in played])
    timings = [t for _, times in played for t in times]
    wanted_s = 1 / config.rate_fps if config.rate_fps else np.inf
    p50, p95, p99 = np.percentile(latencies_s, (50, 95, 99))
    return BenchResult(
        frames_per_s=latencies_s.size / took_s,
        p50_s=float(p50),
        p95_s=float(p95),
        p99_s=float(p99),
        longest_s=float(latencies_s.max()),
        on_pace=int((np.percentile(latencies_s, 95, axis=1) <= wanted_s).sum()),
        reconnects=sum(player.reconnects for player in players),
        queue_s=float(np.mean([t.queue_s for t in timings])),
        model_s=float(np.mean([t.model_s for t in timings])),
        encode_s=float(np.mean([t.encode_s for t in timings])),
        commit_s=float(np.mean([t.commit_s for t in timings])),
    )


def describe(config: BenchConfig, result: BenchResult) -> str:
    """The result as lines for people."""
    r = result
    wanted = f"{config.rate_fps:g} frames/s each" if config.rate_fps else "as fast as it goes"
    rows = {
        "players": f"{config.sessions} x {config.steps} steps, {wanted}",
        "frames/s": f"{r.frames_per_s:.1f} together, {r.frames_per_s / config.sessions:.1f} each",
        "latency": f"p50 {r.p50_s * 1e3:.1f} ms | p95 {r.p95_s * 1e3:.1f} | p99 {r.p99_s * 1e3:.1f} | "
        f"longest {r.longest_s * 1e3:.0f}",
        "in the server": f"queue {r.queue_s * 1e3:.2f} ms | model {r.model_s * 1e3:.2f} | "
        f"encode {r.encode_s * 1e3:.2f} | commit {r.commit_s * 1e3:.2f}",
        "on pace": f"{r.on_pace} of {config.sessions} sessions (95% of their frames in time)",
        "reconnects": str(r.reconnects),
    }
    return "".join(f"{name:14} {text}\n" for name, text in rows.items())


async def _play(player: AsyncPlayer, config: BenchConfig, number: int) -> tuple[list[float], list[Timings]]:
    """Latency and server times of each step of one player, at the wanted rate."""
    rng = np.random.default_rng((config.seed, number))
    latencies: list[float] = []
    timings: list[Timings] = []
    due = time.perf_counter()
    for action in rng.integers(0, player.actions, config.steps).tolist():
        await asyncio.sleep(due - time.perf_counter())
        began = time.perf_counter()
        await player.step(action)
        latencies.append(time.perf_counter() - began)
        if player.message is not None:
            timings.append(player.message.timings)
        due = max(due + (1 / config.rate_fps if config.rate_fps else 0), began)
    return latencies, timings
