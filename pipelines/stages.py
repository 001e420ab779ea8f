"""What differs between the stages of training: the model, its pictures, its artifact, its cost."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from infra.config import Home
from infra.plan import TrainingPlan
from models.actions import LatentActionModel
from models.checkpoint import build_model, load_model, read_json, save_model
from models.config import DynamicsConfig, PolicyConfig, SamplerConfig, WorldConfig, config_from_dict
from models.cost import ModelConfig, cost, on_meta, quality_cost
from models.dynamics import Dynamics
from models.fewstep import Distillation
from models.policy import Policy
from models.quality import QualityNet
from models.sampler import Window
from models.tokenizer import Tokenizer
from models.world import CoTraining, World
from pipelines import feed, figures, quality
from pipelines.agent import agreement, play
from pipelines.jobs import KINDS, Job
from pipelines.measures import frame_psnr
from pipelines.shards import open_dataset
from pipelines.tensor import split_parameters
from pipelines.train_config import TrainConfig

PROMPTS = 8
WATCHED = 128
"""Held-out windows that a policy is measured on."""
PICTURE_ROWS, PICTURE_FRAMES = 4, 8
DELTA_FRAMES = 4
"""Generated frames after which delta-PSNR is read, as in the paper."""
PREVIEW = SamplerConfig(steps=8)
"""Rollout pictures are for the eye, so a few refinement passes do."""


class WithActions(nn.Module):
    """What trains on the actions of a finished latent action model: dynamics, by their own loss or a teacher's draws,
    or a policy."""

    def __init__(self, actions: LatentActionModel, learner: Dynamics | Distillation | Policy) -> None:
        super().__init__()
        self.learner = learner
        self._finished = [actions.eval()]  # in a list, so that it is neither trained nor saved with the checkpoint

    @property
    def finished(self) -> LatentActionModel:
        """The latent action model."""
        return self._finished[0]

    def begin_step(self, step: int, total_steps: int) -> None:
        """Say where training stands."""
        self.learner.begin_step(step, total_steps)

    def end_step(self) -> None:
        """After the optimizer's step."""
        self.learner.end_step()

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The learner's loss for batch["frames"], batch["tokens"], batch["key"]."""
        actions = self.finished.to(batch["frames"].device).infer(batch["frames"], batch.get("tokens"))
        return self.learner({**batch, "actions": actions})


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
        case "policy":
            return WithActions(_actions(job), cast(Policy, build_model("policy", job.config.policy)))
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
    if isinstance(model, WithActions) and isinstance(model.learner, Policy):
        save_model(folder, model.learner)
    elif isinstance(model, (CoTraining, WithActions)):
        _world(job, model).save(folder)
        _write_prompts(job, folder / "prompts")
    else:
        save_model(folder, model)
    if isinstance(model, QualityNet) and isinstance(job.source, quality.Labelled):
        test = quality.labelled(open_dataset(Home(job.config.home), job.source.dataset), job.config.label_holdout)[
            "test"
        ]
        quality.examine(job.source, test, model, folder)


def look_flops(job: Job) -> float:
    """Operations that `look` takes, nearly all of them for frames that dynamics draw."""
    config, model = job.config, job.model
    if config.stage == "tokenizer":
        return PICTURE_ROWS * model.tokenizer.frames * cost(model.tokenizer).forward_flops
    if KINDS[config.stage] == "world":
        return (2 * PROMPTS * DELTA_FRAMES + model.dynamics.actions * PICTURE_FRAMES) * _frame_flops(model.dynamics)
    if config.stage == "policy" and "world" in job.parts:
        card = read_json(job.parts["world"] / "dynamics" / "config.json")
        return PICTURE_ROWS * PICTURE_FRAMES * _frame_flops(config_from_dict(DynamicsConfig, card["config"]))
    return 0.0


def _frame_flops(dynamics: DynamicsConfig) -> float:
    return (PREVIEW.steps + 1) * cost(dynamics).cached_flops


def look(job: Job, weights: Mapping[str, Tensor]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What the stage can do by now, on held-out clips: name -> picture (H,W,3) uint8, and name -> number."""
    model = filled(job, weights)
    if isinstance(model, Tokenizer):
        frames = held_out(job, PICTURE_ROWS, model.cfg.frames)[:, :PICTURE_FRAMES]
        shown = model.decode(model.encode(torch.from_numpy(frames))).numpy()
        picture = figures.sheet([row for pair in zip(frames, shown, strict=True) for row in pair])
        return {"reconstructions": picture}, {"held_out/psnr_db": float(frame_psnr(frames, shown).mean())}
    if isinstance(model, WithActions) and isinstance(model.learner, Policy):
        return _played(job, model.learner), agreement(model.learner, *watched(job))
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


def watched(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Held-out frames (B,T,H,W,3), and what was done after the last of each."""
    frames = held_out(job, WATCHED, job.source.frames)
    shown = torch.from_numpy(frames)
    tokens = _tokenizer(job).encode(shown) if "tokenizer" in job.parts else None
    return frames[:, :-1], _actions(job).infer(shown, tokens)[:, -1].numpy()


def _played(job: Job, policy: Policy) -> dict[str, np.ndarray]:
    """The world that the actions are of, if they are of one, as the policy plays it."""
    if "world" not in job.parts:
        return {}
    world, prompts = World.load(_need(job, "world")), held_out(job, PICTURE_ROWS, 1)[:, 0]
    rows = [play(policy, world, prompt, PICTURE_FRAMES, seed, PREVIEW) for seed, prompt in enumerate(prompts)]
    return {"played": figures.sheet(rows)}


def _one_row_per_action(job: Job, world: World) -> np.ndarray:
    """Each latent action pressed from the same frame."""
    start: Window = world.prompt_window(held_out(job, 1, job.source.frames)[0, :2])
    actions = np.repeat(np.arange(world.action_count)[:, None], PICTURE_FRAMES, axis=1)
    return figures.sheet(list(world.rollout([start] * world.action_count, actions, PREVIEW).numpy()))


def _world(job: Job, model: CoTraining | WithActions) -> World:
    actions = model.actions if isinstance(model, CoTraining) else model.finished
    learned = model.dynamics if isinstance(model, CoTraining) else model.learner
    dynamics = learned.student if isinstance(learned, Distillation) else cast(Dynamics, learned)
    return World(_tokenizer(job), actions, dynamics, job.model.fps)


def _tokenizer(job: Job) -> Tokenizer:
    return cast(Tokenizer, load_model(_need(job, "tokenizer"), kind="tokenizer"))


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


def trained(config: TrainConfig, model: WorldConfig) -> list[ModelConfig]:
    """The models that a stage trains."""
    parts: dict[str, list[ModelConfig]] = {
        "world": [model.actions, model.dynamics],
        "distilled": [model.dynamics],
        "policy": [config.policy],
    }
    return parts.get(config.stage) or [getattr(model, config.stage)]


def estimate(config: TrainConfig, model: WorldConfig) -> TrainingPlan:
    """The arithmetic of a training; needs no dataset, no artifact and no memory.

    Raises:
        UserError: a model's blocks can't be shared by so many workers.
    """
    if config.stage == "quality":
        return _estimate_quality(config)
    models = trained(config, model)
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
    whole = isinstance(config, (DynamicsConfig, PolicyConfig))
    parts = [config.transformer] if whole else [config.encoder, config.decoder]
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
