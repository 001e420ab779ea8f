"""What a training stands on, checked before anything is built: its data, finished parts and identity."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infra.artifact import Artifact, resolve
from infra.config import Home, UserError, digest, to_dict
from models.config import ActionsConfig, TokenizerConfig, WorldConfig, config_from_dict, config_to_dict
from pipelines import feed, quality
from pipelines.shards import Dataset, open_dataset
from pipelines.tokenize import check_size
from pipelines.train_config import TrainConfig

KINDS = {
    "tokenizer": "tokenizer", "actions": "actions", "dynamics": "world", "world": "world", "distilled": "world",
    "policy": "policy", "quality": "quality",
}  # fmt: skip
"""Stage -> kind of its artifact. Finished dynamics stand with their tokenizer and actions: a playable world."""


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
        stage, owner = self.config.stage, self.config if self.config.stage in ("policy", "quality") else self.model
        return config_to_dict(self.model if KINDS[stage] == "world" else getattr(owner, stage))

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
    if config.stage == "policy":
        return _plan_policy(config, home, dataset)
    model, made = config.model, _upstream(config, home)
    if "tokenizer" in made:
        model = replace(model, tokenizer=config_from_dict(TokenizerConfig, made["tokenizer"].config))
    if "actions" in made:
        model = replace(model, actions=config_from_dict(ActionsConfig, made["actions"].config))
    tokens = made["tokenizer"].reference if "tokenizer" in made else None
    parts = {role: artifact.path for role, artifact in made.items()}
    if "teacher" in made:
        model, tokens = config_from_dict(WorldConfig, made["teacher"].config), _tokenizer_of(made["teacher"], home)
        parts |= {part: made["teacher"].path / part for part in ("tokenizer", "actions")}
    _check_frames(config.stage, model)
    part = model.actions if config.stage == "actions" else model.tokenizer
    check_size(dataset, part.height_px, part.width_px, f"the {config.stage}")
    frames = getattr(model, "dynamics" if config.stage in ("world", "distilled") else config.stage).frames
    source = feed.Source(home=home.path, dataset=dataset.reference, split="train", frames=frames, seed=config.seed,
                         feed=config.feed, tokenizer=tokens, words=model.dynamics.words if tokens else 0,
                         text_vocabulary=model.dynamics.text_vocabulary)  # fmt: skip
    identity = _identity(config, model, dataset.reference, made)
    return _job(config, home, model, source, {role: a.reference for role, a in made.items()}, parts, identity)


def _job(
    config: TrainConfig,
    home: Home,
    model: WorldConfig,
    source: feed.Source | quality.Labelled,
    made: dict[str, str],
    parts: dict[str, Path],
    identity: str,
) -> Job:
    return Job(
        config=replace(config, home=home.path, dataset=source.dataset),
        model=model,
        source=source,
        parents={"dataset": source.dataset, **made},
        parts=parts,
        identity=identity,
        folder=home.runs / f"{config.artifact_name}-{identity[:12]}",
    )


def _plan_policy(config: TrainConfig, home: Home, dataset: Dataset) -> Job:
    """The policy's job stands on finished latent actions, alone or in a world, and takes its shape from them."""
    made = resolve(home, config.actions or "actions")
    if made.kind not in ("actions", "world"):
        raise UserError(f"{made.reference} is a {made.kind}: --actions takes latent actions or a world for a policy")
    inside = made.kind == "world"
    actions = config_from_dict(ActionsConfig, made.config["actions"] if inside else made.config)
    policy = replace(
        config.policy, height_px=actions.height_px, width_px=actions.width_px, actions=actions.codebook.size
    )
    check_size(dataset, policy.height_px, policy.width_px, "the policy")
    parts = {"actions": made.path / "actions", "world": made.path} if inside else {"actions": made.path}
    tokens = _tokenizer_of(made, home) if actions.source == "tokens" else None
    if tokens:
        parts["tokenizer"] = resolve(home, tokens, kind="tokenizer").path
    source = feed.Source(home=home.path, dataset=dataset.reference, split="train", frames=policy.frames + 1,
                         seed=config.seed, feed=config.feed, tokenizer=tokens)  # fmt: skip
    config = replace(config, policy=policy)
    identity = _identity(config, config.model, dataset.reference, {"actions": made})
    return _job(config, home, config.model, source, {"actions": made.reference}, parts, identity)


def _plan_quality(config: TrainConfig, home: Home, dataset: Dataset) -> Job:
    """The classifier's job stands on labels as they are now."""
    sides = quality.labelled(dataset, config.label_holdout)
    source = quality.Labelled(home=home.path, dataset=dataset.reference, labels=tuple(sides["train"]),
                              model=config.quality, seed=config.seed, feed=config.feed)  # fmt: skip
    rest = [config.steps, config.batch, config.seed, config.precision, to_dict(config.optimizer)]
    identity = digest(["quality", config_to_dict(config.quality), dataset.reference, sides, rest])
    return _job(config, home, config.model, source, {}, {}, identity)


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


def _tokenizer_of(made: Artifact, home: Home) -> str:
    """The tokenizer that a model was trained with; a student's is its teacher's."""
    if "tokenizer" in made.parents:
        return made.parents["tokenizer"]
    if "teacher" not in made.parents:
        raise UserError(f"{made.reference} does not say which tokenizer it was trained with: name another")
    return _tokenizer_of(resolve(home, made.parents["teacher"]), home)


def _check_frames(stage: str, model: WorldConfig) -> None:
    if stage == "world" and model.actions.frames != model.dynamics.frames:
        raise UserError(
            f"co-training cuts one window for both models, but actions.frames is {model.actions.frames} and "
            f"dynamics.frames is {model.dynamics.frames}: make them equal"
        )


def _identity(config: TrainConfig, model: WorldConfig, dataset: str, made: Mapping[str, Artifact]) -> str:
    """Digest of what decides the result; folders, workers and how often to look do not."""
    alone = {"tokenizer": model.tokenizer, "actions": model.actions, "policy": config.policy}
    order = config.feed
    return digest(
        {
            "stage": config.stage,
            "model": [config_to_dict(alone.get(config.stage, model))],
            "dataset": dataset,
            "parents": {role: artifact.fingerprint for role, artifact in made.items()},
            "order": [order.windows_per_clip, order.clips_per_group, order.avoid_cuts],
            "optimizer": to_dict(config.optimizer),
            "rest": [config.steps, config.batch, config.seed, config.precision],
            **({"few": [config.few_steps, config.teacher_steps]} if config.stage == "distilled" else {}),
        }
    )
