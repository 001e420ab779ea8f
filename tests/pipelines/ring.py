"""A game that is known through and through: a window that looks at a ring of coloured blocks and may turn by one block.

Three true actions (left, stay, right) explain every frame, so what an evaluation must find is known beforehand.
"""

import functools
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from infra.artifact import Artifact, publish
from infra.config import Home, digest
from models.actions import LatentActionModel
from models.config import ActionsConfig, CodebookConfig, DynamicsConfig, TokenizerConfig, TransformerConfig
from models.dynamics import Dynamics
from models.tokenizer import Tokenizer, patchify
from models.world import World
from pipelines.shards import CLIP_SCHEMA, VIDEO_SCHEMA, Unit, Writer
from pipelines.tables import write_shard
from pipelines.video import encode_clip

SIZE, BLOCK, TURN, FRAMES = 16, 4, 8, 5


def footage(count: int, frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips uint8 (count, frames, 16, 16, 3) and the keys (count, frames-1): 0 turns left, 1 stays, 2 turns right."""
    random = np.random.default_rng(seed)
    keys = random.integers(0, 3, (count, frames - 1))
    places = np.cumsum(np.concatenate([random.integers(0, TURN, (count, 1)), keys - 1], axis=1), axis=1) % TURN
    look = np.random.default_rng(0)
    colours = look.integers(20, 236, (6, 3), np.uint8)
    ring = colours[look.integers(0, 6, (SIZE // BLOCK, TURN))].repeat(BLOCK, 0).repeat(BLOCK, 1)
    wide = np.concatenate([ring, ring], axis=1)
    return np.stack([[wide[:, BLOCK * p : BLOCK * p + SIZE] for p in row] for row in places]), keys


def transformer(layers: int, attention: str = "st") -> TransformerConfig:
    """A small one that sees the whole window."""
    return TransformerConfig(layers=layers, width=48, heads=2, head_size=16, attention=attention, window=FRAMES)


def models() -> tuple[Tokenizer, LatentActionModel, Dynamics]:
    """Fresh models for the ring."""
    torch.manual_seed(0)
    shape = {"height_px": SIZE, "width_px": SIZE, "patch": BLOCK, "frames": FRAMES}
    one = transformer(1, "none")
    codes, actions = CodebookConfig(size=16, dim=8), CodebookConfig(size=3, dim=8, warmup_share=0.4)
    tokenizer = TokenizerConfig(**shape, encoder=one, decoder=one, codebook=codes)
    latent = ActionsConfig(**shape, encoder=transformer(2), decoder=transformer(2), codebook=actions)
    dynamics = DynamicsConfig(rows=4, columns=4, vocabulary=16, actions=3, frames=FRAMES, transformer=transformer(4))
    return Tokenizer(tokenizer), LatentActionModel(latent), Dynamics(dynamics)


def fit(model: torch.nn.Module, steps: int, loss_of, lr: float = 3e-3) -> None:
    """Trains on what `loss_of(step)` gives, and leaves the model ready for use."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.9))
    model.train()
    for step in range(steps):
        model.begin_step(step, steps)
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()
        model.end_step()
    model.eval()


@functools.cache
def trained() -> World:
    """A world that knows the ring, made in seconds.

    Tokenizer and dynamics train as always. The latent action model is taught the keys directly, its codes standing
    still: that it finds them by itself is a longer story, told in the tests of models.
    """
    tokenizer, latent, dynamics = models()
    codes = latent.codebook.codes
    latent.codebook.sums.copy_(codes.copy_(3 * torch.eye(*codes.shape)))

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(map(torch.from_numpy, footage(16, FRAMES, step)))

    def tokenizer_loss(step: int) -> torch.Tensor:
        return tokenizer({"frames": batch(step)[0], "key": torch.arange(16) + 16 * step})[0]

    def latent_loss(step: int) -> torch.Tensor:
        frames, keys = batch(step)
        z = latent.encodings(patchify(frames, BLOCK))
        return F.cross_entropy((z @ codes.detach().clone().T).flatten(0, 1), keys.flatten())

    def dynamics_loss(step: int) -> torch.Tensor:
        frames, keys = batch(step)
        known = {"tokens": tokenizer.encode(frames), "actions": keys, "key": torch.arange(16) + 16 * step}
        return dynamics(known)[0]

    fit(tokenizer, 160, tokenizer_loss)
    fit(latent, 80, latent_loss)
    fit(dynamics, 300, dynamics_loss, 4e-3)
    return World(tokenizer, latent, dynamics)


def publish_world(home: Home, folder: Path, world: World, dataset: str) -> Artifact:
    """The world as an artifact that says what it learned from."""
    world.save(folder)
    made = {"name": "ring", "kind": "world", "config": {}, "parents": {"dataset": dataset}, "metrics": {}}
    return publish(home, source_dir=folder, identity=digest(made), **made)


def dataset(home: Home, *, test: int, keys_late: int = 0, keys: bool = True, name: str = "ring") -> str:
    """A real dataset of ring clips: `test` held-out ones, two to learn from, one video left out; its reference.

    Args:
        keys_late: how many frames too late the keys are on record.
        keys: whether they are on record at all.
    """
    frames, pressed = footage(test + 2, 40, seed=99)
    clips, videos = [], []
    for i, (clip, true) in enumerate(zip(frames, pressed, strict=True)):
        record = np.roll([*true, 1], keys_late).tolist()
        facts = {"video_id": f"v{i}", "unit_id": "u0", "split": "test" if i < test else "train"}
        clips.append({**facts, "clip_id": f"c{i}", "start_s": 0.0, "fps": 10, "n_frames": 40, "width_px": SIZE,
                      "height_px": SIZE, "codec": "h264_444", "video": encode_clip(clip, crf=4), "cut_frames": [],
                      "motion": 9.0, "static_share": 0.1, "actions": record if keys else None})  # fmt: skip
        shown = cv2.imencode(".jpg", clip[0])[1].tobytes()
        videos.append({**facts, "uri": f"v{i}.mp4", "outcome": "kept", "clips": 1, "title": f"Ring <{i}>",
                       "preview": shown, "windows": [{"clip_id": f"c{i}", "start_s": 0.0}]})  # fmt: skip
    videos.append({"video_id": "bad", "uri": "bad.mp4", "unit_id": "u0", "split": "train", "outcome": "rejected",
                   "reason": "negating_word", "detail": "movie", "title": "A movie", "clips": 0})  # fmt: skip
    folder = home.datasets / name
    unit = Unit("u0", folder / "clips" / "u0.parquet", folder / "videos" / "u0.parquet")
    write_shard(unit.clips, clips, CLIP_SCHEMA)
    write_shard(unit.videos, videos, VIDEO_SCHEMA)
    return f"{name}@{Writer(folder).commit([unit])}"
