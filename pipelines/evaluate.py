"""Measures a world on clips that no training saw: tokens, latent actions, control, rollouts.

    lampworks evaluate --world world

Definitions and their sources are in docs/evaluation.md.
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from infra.artifact import Artifact, find, publish, resolve
from infra.config import Home, UserError, digest, to_dict
from models.metrics import perplexity, ssim
from models.world import World
from pipelines import figures
from pipelines.config import EvaluateConfig
from pipelines.control import control, distances, holding, refinement
from pipelines.measures import (
    DIRECTIONS,
    Clips,
    Findings,
    Ints,
    Pixels,
    agreement,
    by_chance,
    directions,
    frame_psnr,
    in_batches,
    live_codes,
    merge_rare,
    moving_half,
    visible_shifts,
)
from pipelines.shards import Dataset, open_dataset
from pipelines.video import decode_clip

log = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> Artifact:
    """Measures a world on the held-out clips of a dataset and publishes the numbers, tables and pictures.

    The same world, dataset and settings are measured once: a second call finds the first one's artifact.

    Raises:
        UserError: there is no such world or dataset, the dataset has no held-out clips or clips of another size.
    """
    home = Home(config.home)
    source = resolve(home, config.world, kind="world")
    dataset = open_dataset(home, config.dataset or _dataset_of(source))
    settings = {k: v for k, v in to_dict(config).items() if k not in ("home", "batch", "device")}
    identity = digest({**settings, "world": source.fingerprint, "dataset": dataset.reference})
    name = f"{source.name}-evaluation"
    if done := find(home, name=name, identity=identity):
        log.info("evaluate | %s | already measured | %s", source.reference, done.reference)
        return done
    world = World.load(source.path, config.device)
    findings = measure(world, *held_out(dataset, world, config), config)
    with tempfile.TemporaryDirectory() as folder:
        _write(findings, Path(folder))
        return publish(
            home,
            name=name,
            kind="evaluation",
            source_dir=Path(folder),
            config=to_dict(config),
            parents={"world": source.reference, "dataset": dataset.reference},
            metrics=findings.metrics,
            identity=identity,
        )


def measure(world: World, frames: Pixels, true_actions: Ints | None, config: EvaluateConfig) -> Findings:
    """Every measure of a world on windows of footage.

    Args:
        world: the models.
        frames: (n, T, H, W, 3) held-out windows.
        true_actions: (n, T-1) what was pressed between frame t and t+1, where it is known.
        config: batch sizes, sampler and seed.
    """
    clips = _read(world, frames, true_actions, config)
    findings = Findings()
    for part in (_tokenizer, _stability, _latent_actions, _prediction, control, holding, distances, refinement):
        part(findings, world, clips, config)
        log.info("evaluate | %s | done", part.__name__.strip("_"))
    windows, length, height, width = frames.shape[:4]
    findings.tables["clips"] = {"windows": windows, "frames": length, "height_px": height, "width_px": width}
    findings.tables["bars"] = bars(findings.metrics, world.action_count)
    return findings


def bars(metrics: dict[str, float], actions: int) -> list[dict[str, Any]]:
    """What a first world must reach on held-out footage, and whether it did.

    Returns:
        rows with name, value, unit, note, bar (text) and passed.
    """
    m = metrics
    agreed = max(m.get("nmi_action", 0.0), m["nmi_effect"])
    spans = [f"95% interval {m[f'{k}_low_db']:+.2f} to {m[f'{k}_high_db']:+.2f}." for k in ("dpsnr_uniform", "dpsnr")]
    copied = f"Copying the frame before gives {m['copy_psnr_db']:.1f} dB."
    above = "the whole interval above 0"
    rows = [
        ("Pictures survive tokens", m["tokenizer_psnr_db"], "dB", copied, "30 dB, or 3 dB over copying",
         m["tokenizer_psnr_db"] >= 30 or m["tokenizer_gain_db"] >= 3),
        ("Latent actions in use", m["actions_perplexity"], f"of {actions}", "", f"at least {actions / 2:g}",
         m["actions_perplexity"] >= actions / 2),
        ("Latent actions mean something", agreed, "NMI", "", "0.35 with the keys or the visible motion",
         agreed >= 0.35),
        ("Random actions do worse", m["dpsnr_uniform_db"], "dB", spans[0], above, m["dpsnr_uniform_low_db"] > 0),
        ("Shuffled actions do worse", m["dpsnr_db"], "dB", spans[1], above, m["dpsnr_low_db"] > 0),
    ]  # fmt: skip
    return [
        {"name": name, "value": float(value), "unit": unit, "note": note, "bar": bar, "passed": bool(passed)}
        for name, value, unit, note, bar, passed in rows
    ]


def _tokenizer(findings: Findings, world: World, clips: Clips, config: EvaluateConfig) -> None:
    """What the tokens keep of the pictures, beside the copy of the frame before."""
    decoded = in_batches(world.tokenizer.decode, clips.tokens, config)
    quality, copied = frame_psnr(clips.frames, decoded), frame_psnr(clips.frames[:, 1:], clips.frames[:, :-1])
    moving = moving_half(clips.frames)
    size = world.config.tokenizer.codebook.size
    counts = np.bincount(clips.tokens.ravel(), minlength=size)
    findings.metrics |= {
        "tokenizer_psnr_db": quality.mean(),
        "tokenizer_psnr_moving_db": quality[moving].mean(),
        "tokenizer_ssim": float(ssim(torch.from_numpy(decoded[:, -1]), torch.from_numpy(clips.frames[:, -1])).mean()),
        "copy_psnr_db": copied.mean(),
        "copy_psnr_moving_db": copied[moving].mean(),
        "tokenizer_gain_db": quality[:, 1:].mean() - copied.mean(),
        "tokens_used_share": float((counts > 0).mean()),
        "tokens_perplexity": perplexity(torch.from_numpy(clips.tokens), size),
    }
    findings.tables["tokens"] = {"size": size, "counts": sorted(counts.tolist(), reverse=True)}
    shown = np.flatnonzero(moving)[:4]
    findings.add_sheet("reconstructions", {"original": clips.frames[shown], "from tokens": decoded[shown]})


def _stability(findings: Findings, world: World, clips: Clips, config: EvaluateConfig) -> None:
    """How many tokens stay the same when nothing moves, and when everything moves by exactly one patch."""
    settings = world.config.tokenizer
    last = clips.frames[:, -1:]
    still = np.repeat(last, clips.frames.shape[1], axis=1)
    moved = np.concatenate([still[:, 1:], np.roll(last, settings.patch, axis=3)], axis=1)
    grid = (len(last), -1, settings.rows, settings.columns)
    kept = in_batches(world.tokenizer.encode, still, config).reshape(grid)
    after = in_batches(world.tokenizer.encode, moved, config).reshape(grid)
    findings.metrics |= {
        "token_stability_still": (kept[:, -1] == kept[:, -2]).mean(),
        "token_stability_shift": (after[:, -1, :, 1:-1] == after[:, -2, :, :-2]).mean(),
    }


def _latent_actions(findings: Findings, world: World, clips: Clips, config: EvaluateConfig) -> None:
    """Which codes are used, and how far they agree with the keys and with what is seen to move."""
    count, latent, seen = world.action_count, clips.latent, directions(visible_shifts(clips.frames))
    used = np.bincount(latent.ravel(), minlength=count)
    crossing = np.bincount((latent * len(DIRECTIONS) + seen).ravel(), minlength=count * len(DIRECTIONS))
    findings.metrics |= {
        "actions_used": float((used > 0).sum()),
        "actions_live": float(len(live_codes(latent, count))),
        "actions_perplexity": perplexity(torch.from_numpy(latent), count),
        "nmi_effect": agreement(latent, seen),
        "nmi_effect_chance": by_chance(latent, seen, config.seed),
        "nmi_effect_bound": agreement(merge_rare(seen, count), seen),
    }
    table = findings.tables["actions"] = {
        "counts": used.tolist(),
        "directions": list(DIRECTIONS),
        "effects": crossing.reshape(count, -1).tolist(),
    }
    if clips.true_actions is not None:
        findings.metrics |= {
            "nmi_action": agreement(latent, clips.true_actions),
            "nmi_action_chance": by_chance(latent, clips.true_actions, config.seed),
            "nmi_action_bound": agreement(seen, clips.true_actions),
        }
        table["alignment"] = alignment(latent, clips.true_actions)


def alignment(latent: Ints, true: Ints) -> dict[str, float]:
    """NMI of the latent action of a transition with the key pressed one transition before it, in it and after it.

    Keys are held, so neighbours agree too; a record that is off by one frame shows as a larger value beside "0".
    """
    inner = slice(1, latent.shape[1] - 1)
    return {str(lag): agreement(latent[:, inner], np.roll(true, -lag, axis=1)[:, inner]) for lag in (-1, 0, 1)}


def _prediction(findings: Findings, world: World, clips: Clips, config: EvaluateConfig) -> None:
    """How well the dynamics fill in masked tokens of held-out clips, given the inferred actions."""
    sums = np.zeros(2)
    for first in range(0, len(clips.tokens), config.batch):
        part = slice(first, first + config.batch)
        batch = {
            "tokens": torch.from_numpy(clips.tokens[part]).to(world.device),
            "actions": torch.from_numpy(clips.latent[part]).to(world.device),
            "key": torch.arange(first, min(first + config.batch, len(clips.tokens)), device=world.device),
        }
        with torch.inference_mode():
            loss, metrics = world.dynamics(batch)
        sums += np.array([float(loss), float(metrics["accuracy"])]) * len(batch["key"])
    findings.metrics["masked_loss"], findings.metrics["masked_accuracy"] = (sums / len(clips.tokens)).tolist()


def _read(world: World, frames: Pixels, true_actions: Ints | None, config: EvaluateConfig) -> Clips:
    """The windows with their tokens and latent actions."""
    if world.actions is None:
        raise UserError(
            "this world has no latent action model, so there is nothing to infer from held-out clips: give one that has"
        )
    tokens = in_batches(world.tokenizer.encode, frames, config)
    latent = in_batches(world.actions.infer, frames, config)
    return Clips(frames=frames, true_actions=true_actions, tokens=tokens, latent=latent)


def held_out(dataset: Dataset, world: World, config: EvaluateConfig) -> tuple[Pixels, Ints | None]:
    """Windows of the dataset's `test` split that do not overlap and hold no cut, drawn by the seed.

    Returns:
        frames (n, T, H, W, 3) with n at most `config.clips`; and what was pressed between frame t and t+1, (n, T-1),
        if every clip has a record of it. A clip's `actions[k]` is in force from its frame k on: it leads to frame k+1.

    Raises:
        UserError: there are no such windows, or the clips' size is not the world's.
    """
    facts = dataset.clip_table(["height_px", "width_px", "actions"], "test")
    _check_size(dataset, facts, world)
    rows, length = dataset.index("test"), world.config.frames
    free = [
        (clip, start)
        for clip, (total, cuts) in enumerate(
            zip(rows["n_frames"].to_pylist(), rows["cut_frames"].to_pylist(), strict=True)
        )
        for start in range(0, total - length + 1, length)
        if not any(start < cut < start + length for cut in cuts or ())
    ]
    if not free:
        raise UserError(
            f"{dataset.reference} has no held-out windows of {length} frames without a cut: "
            "curate more videos, or with a larger --holdout-share"
        )
    picked = sorted(np.random.default_rng(config.seed).permutation(len(free))[: config.clips].tolist())
    places = [free[i] for i in picked]
    videos = {clip: dataset.read_clips(rows.slice(clip, 1))[0] for clip in {clip for clip, _ in places}}
    frames = np.stack([decode_clip(videos[clip], start, length) for clip, start in places])
    pressed = facts["actions"].to_pylist()
    if any(pressed[clip] is None for clip, _ in places):
        return frames, None
    return frames, np.array([pressed[clip][start : start + length - 1] for clip, start in places], np.int64)


def _check_size(dataset: Dataset, facts: pa.Table, world: World) -> None:
    """Raise UserError unless all clips have the world's size."""
    height, width, _ = world.frame_shape
    for found in set(zip(facts["height_px"].to_pylist(), facts["width_px"].to_pylist(), strict=True)):
        if found != (height, width):
            raise UserError(
                f"{dataset.reference} has clips of {found[1]}x{found[0]} px, the world is for {width}x{height}: "
                f"curate with --width-px {width} --height-px {height}"
            )


def _dataset_of(world: Artifact) -> str:
    """The dataset version that the world learned from."""
    if "dataset" not in world.parents:
        raise UserError(f"{world.reference} does not say which dataset it learned from: name one with --dataset")
    return world.parents["dataset"]


def _write(findings: Findings, folder: Path) -> None:
    """The findings as files: measures.json, a PNG for each picture, an SVG for each chart."""
    (folder / "measures.json").write_text(json.dumps(findings.tables, indent=1, default=float))
    for name, picture in findings.pictures.items():
        (folder / f"{name}.png").write_bytes(figures.png(picture))
    for name, chart in findings.charts.items():
        (folder / f"{name}.svg").write_text(chart, encoding="utf-8")
