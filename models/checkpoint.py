"""Weights on disk: safetensors beside a JSON of settings. Atomic to write; loading checks all, executes nothing."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from models.actions import LatentActionModel
from models.config import (
    ActionsConfig,
    DynamicsConfig,
    ModelError,
    PolicyConfig,
    QualityConfig,
    TokenizerConfig,
    config_from_dict,
    config_to_dict,
)
from models.dynamics import Dynamics
from models.policy import Policy
from models.quality import QualityNet
from models.tokenizer import Tokenizer

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
_KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "tokenizer": (Tokenizer, TokenizerConfig),
    "actions": (LatentActionModel, ActionsConfig),
    "dynamics": (Dynamics, DynamicsConfig),
    "policy": (Policy, PolicyConfig),
    "quality": (QualityNet, QualityConfig),
}
Model = Tokenizer | LatentActionModel | Dynamics | Policy | QualityNet


def build_model(kind: str, config: Any) -> Model:
    """A fresh model of a kind; `config` is its dataclass or `config_to_dict` of it.

    Raises:
        ModelError: the kind is unknown, or the config is of another kind or refused.
    """
    if kind not in _KINDS:
        raise ModelError(f"there is no model kind {kind!r}; use one of {', '.join(_KINDS)}")
    model, settings = _KINDS[kind]
    if isinstance(config, Mapping):
        config = config_from_dict(settings, config, kind)
    if not isinstance(config, settings):
        raise ModelError(f"a {kind} is built from {settings.__name__}, not from {type(config).__name__}")
    return model(config)  # pyrefly: ignore


def kind_of(model: nn.Module) -> str:
    """tokenizer, actions, dynamics, policy or quality.

    Raises:
        ModelError: it is none of them.
    """
    for kind, (cls, _) in _KINDS.items():
        if isinstance(model, cls):
            return kind
    raise ModelError(f"{type(model).__name__} is no model that is saved by itself; save its parts")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    part.replace(path)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ModelError: there is no such file, or it is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist; give a folder that a model was saved to") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is damaged ({error}); restore it from the artifact's copy or train again") from error


def save_model(directory: str | Path, model: nn.Module) -> None:
    """Write model.safetensors and config.json {"kind", "config", "sha256"}; the config last, so it vouches for both."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    handle, part = tempfile.mkstemp(dir=directory, prefix=".weights-")
    os.close(handle)
    save_file(state, part)
    digest = sha256(Path(part))
    Path(part).chmod(0o644)
    Path(part).replace(directory / _WEIGHTS)
    write_json(directory / _CONFIG, {"kind": kind_of(model), "config": config_to_dict(model.cfg), "sha256": digest})


def load_model(directory: str | Path, device: str | torch.device = "cpu", kind: str | None = None) -> Model:
    """The saved model, in evaluation mode.

    Args:
        directory: what `save_model` wrote.
        device: where to put it.
        kind: what it must be, if that matters.

    Raises:
        ModelError: a file is missing or damaged, the digest or a shape differs, or a weight is not finite.
    """
    directory = Path(directory)
    card = read_json(directory / _CONFIG)
    if not isinstance(card, dict) or not {"kind", "config", "sha256"} <= set(card):
        raise ModelError(f"{directory / _CONFIG} lacks kind, config or sha256; it was not written by save_model")
    if kind is not None and card["kind"] != kind:
        raise ModelError(f"{directory} holds a {card['kind']}, not a {kind}; give the {kind}'s folder")
    weights = directory / _WEIGHTS
    if not weights.exists():
        raise ModelError(f"{weights} does not exist; restore it from the artifact's copy or train again")
    if (found := sha256(weights)) != card["sha256"]:
        raise ModelError(
            f"{weights} has digest {found[:12]}, config.json expects {str(card['sha256'])[:12]}; "
            "the file changed after it was saved, restore it"
        )
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ModelError(f"{weights} is no readable safetensors file ({error}); restore it") from error
    model = build_model(card["kind"], card["config"])
    _fill(model, state, weights)
    return model.to(device).eval()


def _fill(model: nn.Module, state: dict[str, torch.Tensor], where: Path) -> None:
    """Load after checking names, shapes and finiteness."""
    wanted = model.state_dict()
    if strange := sorted(set(wanted) ^ set(state)):
        raise ModelError(
            f"{where} does not fit its config.json: {strange[0]!r} is on one side only; it belongs to another preset"
        )
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ModelError(
                f"{where}: {name} has shape {tuple(value.shape)}, its config.json needs "
                f"{tuple(wanted[name].shape)}; it belongs to another preset"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ModelError(
                f"{where}: {name} has values that are not finite; training diverged, use an older checkpoint"
            )
    model.load_state_dict(state)
