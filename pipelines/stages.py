"""What differs between the stages of training: the model, what it stands on, its pictures, its artifact."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from infra.artifact import Artifact, resolve
from infra.config import Home, UserError, digest, to_dict
from infra.plan import TrainingPlan
from models.actions import LatentActionModel
from models.checkpoint import build_model, load_model, save_model
from models.config import (
    ActionsConfig,
    DynamicsConfig,
    SamplerConfig,
    TokenizerConfig,
    WorldConfig,
    config_from_dict,
    config_to_dict,
)
from models.cost import ModelConfig, cost, on_meta, quality_cost
from models.dynamics import Dynamics
from models.fewstep import Distillation
from models.quality import QualityNet
from models.sampler import Window
from models.tokenizer import Tokenizer
from models.world import CoTraining, World
from pipelines import feed, figures, quality
from pipelines.measures import frame_psnr
from pipelines.shards import Dataset, open_dataset
from pipelines.tensor import split_parameters
from pipelines.tokenize import check_size
from pipelines.train_config import TrainConfig

KINDS = {
    "tokenizer": "tokenizer", "actions": "actions", "dynamics": "world", "world": "world", "distilled": "world",
    "quality": "quality",
}  # fmt: skip
"""Stage -> kind of its artifact. Finished dynamics stand with their tokenizer and actions: a playable world."""
PROMPTS = 8
PICTURE_ROWS, PICTURE_FRAMES = 4, 8
DELTA_FRAMES = 4
"""Generated frames after which delta-PSNR is read, as in the paper."""
PREVIEW = SamplerConfig(steps=8)
"""Rollout pictures are for the eye, so a few refinement passes do."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training with everything resolved: what workers on any node get."""

    config: TrainConfig
    model: WorldConfig
    """With finished parts as they are in their artifacts."""
    source: feed.Source | quality.Labelled
    parents: dict[str, str]
    """role -> reference"""
    parts: dict[str, Path]
    """role -> folder of a finished model that the stage stands on"""
    identity: str
    folder: Path
    """Checkpoints, progress and pictures of this training."""

    @property
    def settings(self) -> dict[str, Any]:
        """The model's settings as the artifact records them."""
        stage, owner = self.config.stage, self.config if self.config.stage == "quality" else self.model
        return config_to_dict(getattr(owner, stage) if stage in ("tokenizer", "actions", "quality") else self.model)

    def schedule(self, skipped: tuple[int, ...] = ()) -> feed.Schedule:
        """Which samples each micro-batch holds."""
        config = self.config
        return feed.Schedule(batch=config.batch, micro_batch=config.micro_batch, steps=config.steps, skipped=skipped)


def plan_job(config: TrainConfig) -> Job:
    """Finds what the stage stands on, checks that it fits, and gives the training its identity.

    Raises:
        UserError, ModelError: dataset or artifact missing, resolutions or settings that do not fit together.
    """
    home = Home(config.home).ensure()
    dataset = open_dataset(home, config.dataset)
    if config.stage == "quality":
        return _plan_quality(config, home, dataset)
    model, made = config.model, _upstream(config, home)
    if "tokenizer" in made:
        model = replace(model, tokenizer=config_from_dict(TokenizerConfig, made["tokenizer"].config))
    if "actions" in made:
        model = replace(model, actions=config_from_dict(ActionsConfig, made["actions"].config))
    tokens = made["tokenizer"].reference if "tokenizer" in made else None
    parts = {role: artifact.path for role, artifact in made.items()}
    if "teacher" in made:
        model, tokens = config_from_dict(WorldConfig, made["teacher"].config), made["teacher"].parents["tokenizer"]
        parts |= {part: made["teacher"].path / part for part in ("tokenizer", "actions")}
    _check_frames(config.stage, model)
    part = model.actions if config.stage == "actions" else model.tokenizer
    check_size(dataset, part.height_px, part.width_px, f"the {config.stage}")
    frames = getattr(model, "dynamics" if config.stage in ("world", "distilled") else config.stage).frames
    source = feed.Source(home=home.path, dataset=dataset.reference, split="train", frames=frames, seed=config.seed,
                         feed=config.feed, tokenizer=tokens, words=model.dynamics.words if tokens else 0,
                         text_vocabulary=model.dynamics.text_vocabulary)  # fmt: skip
    identity = _identity(config, model, dataset.reference, made)
    return Job(
        config=replace(config, home=home.path, dataset=dataset.reference),
        model=model,
        source=source,
        parents={"dataset": dataset.reference, **{role: a.reference for role, a in made.items()}},
        parts=parts,
        identity=identity,
        folder=home.runs / f"{config.artifact_name}-{identity[:12]}",
    )


def _plan_quality(config: TrainConfig, home: Home, dataset: Dataset) -> Job:
    """The classifier's job stands on labels as they are now."""
    sides = quality.labelled(dataset, config.label_holdout)
    source = quality.Labelled(home=home.path, dataset=dataset.reference, labels=tuple(sides["train"]),
                              model=config.quality, seed=config.seed, feed=config.feed)  # fmt: skip
    rest = [config.steps, config.batch, config.seed, config.precision, to_dict(config.optimizer)]
    identity = digest(["quality", config_to_dict(config.quality), dataset.reference, sides, rest])
    return Job(
        config=replace(config, home=home.path, dataset=dataset.reference),
        model=config.model,
        source=source,
        parents={"dataset": dataset.reference},
        parts={},
        identity=identity,
        folder=home.runs / f"{config.artifact_name}-{identity[:12]}",
    )


def _upstream(config: TrainConfig, home: Home) -> dict[str, Artifact]:
    """Finished parts that the stage stands on, by role."""
    made: dict[str, Artifact] = {}
    if config.stage in ("dynamics", "world") or (config.stage, config.model.actions.source) == ("actions", "tokens"):
        made["tokenizer"] = resolve(home, config.tokenizer or "tokenizer", kind="tokenizer")
    if config.stage == "distilled":
        made["teacher"] = resolve(home, config.teacher or "world", kind="world")
    if config.stage == "dynamics":
        made["actions"] = resolve(home, config.actions or "actions", kind="actions")
    return made


def _check_frames(stage: str, model: WorldConfig) -> None:
    if stage == "world" and model.actions.frames != model.dynamics.frames:
        raise UserError(
            f"co-training cuts one window for both models, but actions.frames is {model.actions.frames} and "
            f"dynamics.frames is {model.dynamics.frames}: make them equal"
        )


def _identity(config: TrainConfig, model: WorldConfig, dataset: str, made: Mapping[str, Artifact]) -> str:
    """Digest of what decides the result; folders, workers and how often to look do not."""
    parts = {"tokenizer": [model.tokenizer], "actions": [model.actions]}.get(config.stage, [model])
    order = config.feed
    return digest(
        {
            "stage": config.stage,
            "model": [config_to_dict(part) for part in parts],
            "dataset": dataset,
            "parents": {role: artifact.fingerprint for role, artifact in made.items()},
            "order": [order.windows_per_clip, order.clips_per_group, order.avoid_cuts],
            "optimizer": to_dict(config.optimizer),
            "rest": [config.steps, config.batch, config.seed, config.precision],
            **({"few": [config.few_steps, config.teacher_steps]} if config.stage == "distilled" else {}),
        }
    )


class WithActions(nn.Module):
    """Dynamics that train on the actions of a finished latent action model, by their own loss or a teacher's draws."""

    def __init__(self, actions: LatentActionModel, dynamics: Dynamics | Distillation) -> None:
        super().__init__()
        self.dynamics = dynamics
        self._finished = [actions.eval()]  # in a list, so that it is neither trained nor saved with the checkpoint

    def begin_step(self, step: int, total_steps: int) -> None:
        """Say where training stands."""
        self.dynamics.begin_step(step, total_steps)

    def end_step(self) -> None:
        """After the optimizer's step."""
        self.dynamics.end_step()

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The dynamics' loss for batch["frames"], batch["tokens"], batch["key"]."""
        actions = self._finished[0].to(batch["tokens"].device).infer(batch["frames"])
        return self.dynamics({**batch, "actions": actions})


def build(job: Job) -> nn.Module:
    """The stage's trainable, the same on every rank and at every start."""
    torch.manual_seed(job.config.seed)
    match job.config.stage:
        case "tokenizer":
            return build_model("tokenizer", job.model.tokenizer)
        case "actions":
            return build_model("actions", job.model.actions)
        case "dynamics":
            dynamics = cast(Dynamics, build_model("dynamics", job.model.dynamics))
            return WithActions(_actions(job), dynamics)
        case "distilled":
            teacher = cast(Dynamics, load_model(_need(job, "teacher") / "dynamics", kind="dynamics"))
            student = copy.deepcopy(teacher).train()
            config = job.config
            return WithActions(_actions(job), Distillation(teacher, student, config.few_steps, config.teacher_steps))
        case "world":
            actions = cast(LatentActionModel, build_model("actions", job.model.actions))
            return CoTraining(actions, cast(Dynamics, build_model("dynamics", job.model.dynamics)))
        case "quality":
            return build_model("quality", job.config.quality)


def filled(job: Job, weights: Mapping[str, Tensor]) -> nn.Module:
    """The stage's trainable with these weights, to look at or to publish."""
    model = build(job)
    model.load_state_dict(dict(weights))
    return model.eval()


def export(job: Job, weights: Mapping[str, Tensor], folder: Path) -> None:
    """The finished stage as the artifact's files."""
    model = filled(job, weights)
    if isinstance(model, (CoTraining, WithActions)):
        _world(job, model).save(folder)
        _write_prompts(job, folder / "prompts")
    else:
        save_model(folder, model)
    if isinstance(model, QualityNet) and isinstance(job.source, quality.Labelled):
        test = quality.labelled(open_dataset(Home(job.config.home), job.source.dataset), job.config.label_holdout)[
            "test"
        ]
        quality.examine(job.source, test, model, folder)


def look(job: Job, weights: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What the stage can do by now, on held-out clips: name -> picture (H,W,3) uint8, and name -> number."""
    model = filled(job, weights)
    if isinstance(model, Tokenizer):
        frames = held_out(job, PICTURE_ROWS, model.cfg.frames)[:, :PICTURE_FRAMES]
        shown = model.decode(model.encode(torch.from_numpy(frames))).numpy()
        picture = figures.sheet([row for pair in zip(frames, shown, strict=True) for row in pair])
        return {"reconstructions": picture}, {"held_out/psnr_db": float(frame_psnr(frames, shown).mean())}
    if isinstance(model, (CoTraining, WithActions)):
        world = _world(job, model)
        return {"actions": _one_row_per_action(job, world)}, {"held_out/dpsnr_db": _delta_psnr(job, world)}
    return {}, {}


def _delta_psnr(job: Job, world: World) -> float:
    """What a few rollouts lose with another rollout's actions, in dB at the last frame shown (paper, section 3).
    The evaluation takes more windows and says how sure it is; this is to see it grow."""
    frames = held_out(job, PROMPTS, job.source.frames)[:, : 1 + DELTA_FRAMES]
    shown = torch.from_numpy(frames)
    latent = cast(LatentActionModel, world.actions).infer(shown, world.tokenizer.encode(shown)).numpy()
    starts: list[Window] = [world.prompt_window(window[:1], seed) for seed, window in enumerate(frames)]
    arms = np.concatenate((latent, np.roll(latent, 1, axis=0)))
    made = world.rollout(starts * 2, arms, PREVIEW).numpy()
    true, other = (frame_psnr(frames[:, -1], part[:, -1]) for part in np.split(made, 2))
    return float((true - other).mean())


def held_out(job: Job, count: int, frames: int) -> np.ndarray:
    """Windows of the test split, or of the training split where there is no test clip: uint8 (count,T,H,W,3)."""
    home, reference = Home(job.config.home), job.source.dataset
    split = "test" if open_dataset(home, reference).index("test").num_rows else "train"
    return feed.windows(home, reference, split, frames, count, seed=0)


def _one_row_per_action(job: Job, world: World) -> np.ndarray:
    """Each latent action pressed from the same frame."""
    start: Window = world.prompt_window(held_out(job, 1, job.source.frames)[0, :2])
    actions = np.repeat(np.arange(world.action_count)[:, None], PICTURE_FRAMES, axis=1)
    return figures.sheet(list(world.rollout([start] * world.action_count, actions, PREVIEW).numpy()))


def _world(job: Job, model: CoTraining | WithActions) -> World:
    actions = model.actions if isinstance(model, CoTraining) else model._finished[0]
    tokenizer = cast(Tokenizer, load_model(_need(job, "tokenizer"), kind="tokenizer"))
    dynamics = model.dynamics.student if isinstance(model.dynamics, Distillation) else model.dynamics
    return World(tokenizer, actions, dynamics, job.model.fps)


def _actions(job: Job) -> LatentActionModel:
    return cast(LatentActionModel, load_model(_need(job, "actions"), kind="actions"))


def _write_prompts(job: Job, folder: Path) -> None:
    """First frames of held-out windows, for players to start from."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, frames in enumerate(held_out(job, PROMPTS, job.source.frames)):
        (folder / f"{n}.png").write_bytes(figures.png(frames[0]))


def _need(job: Job, role: str) -> Path:
    if role not in job.parts:
        raise ValueError(f"the job was planned without the {role} that its stage stands on")
    return job.parts[role]


def trained(stage: str, model: WorldConfig) -> list[ModelConfig]:
    """The models that a stage trains."""
    parts: dict[str, list[ModelConfig]] = {"world": [model.actions, model.dynamics], "distilled": [model.dynamics]}
    return parts.get(stage) or [getattr(model, stage)]


def estimate(config: TrainConfig, model: WorldConfig) -> TrainingPlan:
    """The arithmetic of a training; needs no dataset, no artifact and no memory.

    Raises:
        UserError: a model's blocks can't be shared by so many workers.
    """
    if config.stage == "quality":
        return _estimate_quality(config)
    models = trained(config.stage, model)
    costs = [cost(part) for part in models]
    return TrainingPlan(
        parameters=sum(c.parameters for c in costs),
        frame_flops=sum(c.training_flops for c in costs),
        frames=models[-1].frames,
        tokens=models[-1].rows * models[-1].columns,
        activation_bytes=sum(_activation_bytes(part, config.precision) for part in models),
        batch=config.batch,
        micro_batch=config.micro_batch,
        steps=config.steps,
        workers=max(1, config.workers),
        tensor=config.tensor,
        split=sum(split_parameters(on_meta(part), config.tensor) for part in models) if config.tensor > 1 else 0,
    )


def _estimate_quality(config: TrainConfig) -> TrainingPlan:
    cfg = config.quality
    parameters, flops = quality_cost(cfg)
    maps = 3 * cfg.width * cfg.height_px * cfg.width_px // 4 + 12 * 2 * cfg.width * cfg.height_px * cfg.width_px // 16
    return TrainingPlan(parameters=parameters, frame_flops=flops, frames=cfg.frames, tokens=1,
                        activation_bytes=4.0 * cfg.frames * maps, batch=config.batch, micro_batch=config.micro_batch,
                        steps=config.steps, workers=max(1, config.workers))  # fmt: skip


def _activation_bytes(config: ModelConfig, precision: str) -> float:
    """What the backward pass needs of one window, roughly: per token and block the inputs of its norms, products and
    attentions (arXiv 2205.05198, section 4, without the score matrix); with recomputation the blocks' inputs alone."""
    parts = [config.transformer] if isinstance(config, DynamicsConfig) else [config.encoder, config.decoder]
    values = 0.0
    for part in parts:
        blocks = -(-part.layers // 2) if part.attention == "st" else part.layers
        attention = part.layers * (3 * part.width + 4 * part.heads * part.head_size)
        forward = blocks * (2 * part.width + 2 * int(part.width * part.ff_ratio))
        kept = (attention + forward) / blocks + blocks * part.width if part.checkpointing else attention + forward
        values += config.frames * config.rows * config.columns * kept
    vocabulary = config.vocabulary if isinstance(config, DynamicsConfig) else 0
    logits = config.frames * config.rows * config.columns * vocabulary * 8.0  # fp32, and their gradient
    return values * (2 if precision == "bf16" else 4) + logits
