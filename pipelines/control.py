"""Whether actions steer a world: rollouts of many prompts at once, delta-PSNR, and what holding an action does."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from models.metrics import frechet_distance, random_features
from models.sampler import Window
from models.world import World
from pipelines import figures
from pipelines.config import EvaluateConfig
from pipelines.figures import Line, line_chart
from pipelines.measures import (
    DIRECTIONS,
    Clips,
    Findings,
    Floats,
    Ints,
    Pixels,
    directions,
    frame_psnr,
    in_batches,
    interval,
    live_codes,
    moving_half,
    visible_shifts,
)

HEADLINE_T = 4
"""The generated frame at which the paper states delta-PSNR."""
REFINED = 32
"""Windows that are rolled out once more for each number of refinement steps."""
FORCED = 64
"""Windows of the teacher-forced reading: its variance is low, and each needs its whole past in the cache."""


def rollouts(
    world: World, tokens: Ints, past: Ints, actions: Ints, seeds: Sequence[int], config: EvaluateConfig
) -> Pixels:
    """Frames that the world makes from prompts under given actions, many rollouts at once.

    Args:
        world: the models.
        tokens: (m, P, N) prompt frames.
        past: (m, P-1) actions between the prompt frames.
        actions: (m, S) what is pressed then.
        seeds: (m,) of the sampler's noise; equal seeds, prompts and actions give equal frames.
        config: slots and sampler.

    Returns:
        (m, S, H, W, 3).
    """

    threads = torch.get_num_threads() if config.device == "cpu" else 1
    size = min(config.batch, -(-len(tokens) // threads))

    def play(first: int) -> Pixels:
        part = slice(first, first + size)
        prompts = [
            Window(torch.from_numpy(t), torch.from_numpy(a), len(t) - 1, int(seed))
            for t, a, seed in zip(tokens[part], past[part], seeds[part], strict=True)
        ]
        return world.rollout(prompts, torch.from_numpy(actions[part].copy()), config.sampler).numpy()

    if config.device != "cpu":
        return np.concatenate([play(first) for first in range(0, len(tokens), size)])
    # One thread a group: rollouts then share passes with equal bits, and small products don't gain from more threads.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = list(pool.map(play, range(0, len(tokens), size)))
    torch.set_num_threads(threads)
    return np.concatenate(parts)


def control(findings: Findings, world: World, clips: Clips, config: EvaluateConfig) -> None:
    """Delta-PSNR (paper, section 3): what rollouts lose when their actions are not the inferred ones."""
    arms = _arms(clips, world.action_count, config.seed)
    made = _play_arms(world, clips, list(arms.values()), config)
    truth, prompt = clips.frames[:, 1:], clips.frames[:, :1]
    quality = {arm: frame_psnr(truth, frames) for arm, frames in zip(arms, made, strict=True)}
    repeat = frame_psnr(truth, prompt.repeat(truth.shape[1], axis=1))
    delta = {arm: quality["inferred"] - quality[arm] for arm in ("permuted", "uniform")}
    at, moving = min(HEADLINE_T, truth.shape[1]) - 1, moving_half(clips.frames)
    readings = {
        "dpsnr": delta["permuted"][:, at],
        "dpsnr_uniform": delta["uniform"][:, at],
        "dpsnr_moving": delta["permuted"][moving, at],
        "dpsnr_forced": _teacher_forced(world, clips, arms["permuted"], config),
    }
    for name, values in readings.items():
        found = interval(values, config.seed)
        findings.metrics |= {
            f"{name}_db": found["mean"],
            f"{name}_low_db": found["low"],
            f"{name}_high_db": found["high"],
        }
    findings.metrics["rollout_psnr_db"] = float(quality["inferred"].mean())
    findings.metrics["repeat_psnr_db"] = float(repeat.mean())
    table = findings.tables["control"] = {
        "t": at + 1,
        "curves": {arm: [interval(d, config.seed) for d in by_clip.T] for arm, by_clip in delta.items()},
        "rollout": {arm: q.mean(0).tolist() for arm, q in {**quality, "repeat": repeat}.items()},
    }
    findings.charts |= _charts(table)
    shown = np.flatnonzero(moving)[:3]
    rows = {"truth": truth, "inferred actions": made[0], "shuffled actions": made[1]}
    findings.add_sheet("rollouts", {n: np.concatenate([prompt[shown], f[shown]], axis=1) for n, f in rows.items()})


def distances(findings: Findings, world: World, clips: Clips, config: EvaluateConfig) -> None:
    """Frechet distance on random features (frd3d) of what the world makes to held-out footage, beside what it can be.

    One half of the windows (every other) is the reference; all else is made of the other half, so every number has the
    same clips and count behind it. Few windows bias it upwards: read it against the floor.
    """
    n = len(clips.frames) // 2
    if n < 2:
        return
    reference, other = clips.frames[: 2 * n : 2], clips.frames[1 : 2 * n : 2]
    tokens, latent = clips.tokens[1 : 2 * n : 2], clips.latent[1 : 2 * n : 2]
    made = rollouts(world, tokens[:, :1], np.empty((n, 0), np.int64), latent, range(n), config)
    decoded = in_batches(world.tokenizer.decode, tokens, config)
    order = np.random.default_rng(config.seed).permutation(other.shape[1])
    sides = {
        "frd3d_floor": other,
        "frd3d_tokens": decoded,
        "frd3d": np.concatenate([other[:, :1], made], axis=1),
        "frd3d_shuffled": other[:, order],
        "frd3d_frozen": other[:, :1].repeat(other.shape[1], axis=1),
    }
    known = in_batches(random_features, reference, config)
    for name, frames in sides.items():
        found = frechet_distance(*map(torch.from_numpy, (known, in_batches(random_features, frames, config))))
        findings.metrics[name] = found
    findings.metrics["frd3d_windows"] = float(n)


def refinement(findings: Findings, world: World, clips: Clips, config: EvaluateConfig) -> None:
    """What fewer or more refinement steps a frame do to rollouts under the inferred actions, and what they cost."""
    n = min(len(clips.tokens), REFINED)
    nothing = np.empty((n, 0), np.int64)
    rows: list[dict[str, float]] = []
    for steps in config.steps:
        start = time.perf_counter()
        settings = replace(config, sampler=replace(config.sampler, steps=steps))
        made = rollouts(world, clips.tokens[:n, :1], nothing, clips.latent[:n], range(n), settings)
        rate = made.shape[0] * made.shape[1] / (time.perf_counter() - start)
        quality = frame_psnr(clips.frames[:n, 1:], made)
        rows.append({"steps": steps, "psnr_db": quality.mean(), "first_psnr_db": quality[:, 0].mean(), "fps": rate})
    if not rows:
        return
    curves = {"first frame": "first_psnr_db", "all frames": "psnr_db"}
    lines = [
        Line(label=name, x=[row["steps"] for row in rows], y=[row[key] for row in rows], tone=tone)
        for tone, (name, key) in enumerate(curves.items())
    ]
    findings.tables["refinement"] = {"windows": n, "rows": rows}
    findings.charts["refinement"] = line_chart(
        lines, x_label="refinement steps a frame", y_label="PSNR (dB)", whole=True
    )


def _charts(control: dict[str, Any]) -> dict[str, str]:
    """Delta-PSNR with its intervals, and the quality of rollouts, over generated frames."""
    steps = range(1, len(control["rollout"]["inferred"]) + 1)
    against = {"permuted": "against shuffled", "uniform": "against random"}
    deltas = [
        Line(label=against[arm], x=steps, y=[c["mean"] for c in curve], tone=tone,
             band=([c["low"] for c in curve], [c["high"] for c in curve]))
        for tone, (arm, curve) in enumerate(control["curves"].items())
    ]  # fmt: skip
    names = {"inferred": "inferred", "permuted": "shuffled", "repeat": "first frame kept"}
    quality = [
        Line(label=name, x=steps, y=control["rollout"][arm], tone=tone, dashed=arm == "repeat")
        for tone, (arm, name) in enumerate(names.items())
    ]
    return {
        "dpsnr": line_chart(deltas, x_label="generated frame", y_label="ΔPSNR (dB)", zero=True, whole=True),
        "rollouts": line_chart(quality, x_label="generated frame", y_label="PSNR (dB)", whole=True),
    }


def _arms(clips: Clips, count: int, seed: int) -> dict[str, Ints]:
    """Actions (n, T-1) of each arm: inferred; the same permuted across clips, each step by itself; any live code."""
    random = np.random.default_rng(seed)
    permuted = random.permuted(clips.latent, axis=0)
    uniform = random.choice(live_codes(clips.latent, count), clips.latent.shape)
    return {"inferred": clips.latent, "permuted": permuted, "uniform": uniform}


def _play_arms(world: World, clips: Clips, arms: list[Ints], config: EvaluateConfig) -> Pixels:
    """Rollouts from the first frame with equal noise in all arms: (arms, n, T-1, H, W, 3)."""
    n, count = len(clips.tokens), len(arms)
    prompts, nothing = np.concatenate([clips.tokens[:, :1]] * count), np.empty((n * count, 0), np.int64)
    made = rollouts(world, prompts, nothing, np.concatenate(arms), list(range(n)) * count, config)
    return made.reshape(count, n, *made.shape[1:])


def _teacher_forced(world: World, clips: Clips, other: Ints, config: EvaluateConfig) -> Floats:
    """Delta-PSNR of the last frame after the true ones, when only the last action is another: (at most `FORCED`,)."""
    n = min(len(clips.tokens), FORCED)
    tokens, past = (np.concatenate([part[:n, :-1]] * 2) for part in (clips.tokens, clips.latent))
    last = np.concatenate([clips.latent[:n, -1:], other[:n, -1:]])
    made = rollouts(world, tokens, past, last, list(range(n)) * 2, config)[:, 0]
    truth = clips.frames[:n, -1]
    return frame_psnr(truth, made[:n]) - frame_psnr(truth, made[n:])


def holding(findings: Findings, world: World, clips: Clips, config: EvaluateConfig) -> None:
    """What holding each action does from the same frames: pictures, and the motion seen in them."""
    count, steps = world.action_count, clips.latent.shape[1]
    starts = np.flatnonzero(moving_half(clips.frames))[: config.prompts]
    tokens = np.repeat(clips.tokens[starts, :1], count, axis=0)
    held = np.broadcast_to(np.tile(np.arange(count), len(starts))[:, None], (len(tokens), steps))
    past = np.empty((len(tokens), 0), np.int64)
    made = rollouts(world, tokens, past, held, np.repeat(starts, count).tolist(), config)
    whole = np.concatenate([np.repeat(clips.frames[starts, :1], count, axis=0), made], axis=1)
    whole = whole.reshape(len(starts), count, *whole.shape[1:])
    shifts = visible_shifts(whole.reshape(-1, *whole.shape[2:])).reshape(len(starts), count, steps, 2)
    mean = shifts.mean((0, 2))
    named = directions(np.where(np.abs(mean) < 0.25, 0, np.sign(mean)).astype(np.int64))
    spread = whole[:, :, -1].astype(np.float32).std(1).mean((1, 2, 3))
    best = whole[int(spread.argmax())]
    live = set(live_codes(clips.latent, count).tolist())
    findings.metrics["held_effects"] = float(len({int(named[a]) for a in live}))
    findings.metrics["held_spread"] = float(spread.mean())
    findings.tables["holding"] = [
        {"action": a, "live": a in live, "down_px": mean[a, 0], "right_px": mean[a, 1], "effect": DIRECTIONS[named[a]]}
        for a in range(count)
    ]
    findings.tables["starts"] = len(starts)
    findings.pictures["actions"] = figures.sheet(list(best))
    findings.pictures |= {f"action-{a}": figures.strip(best[a]) for a in range(count)}
