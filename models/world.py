"""A playable world: start from a picture, step with actions. And the co-training of its actions and dynamics."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from models.actions import LatentActionModel
from models.checkpoint import load_model, read_json, save_model, write_json
from models.config import ActionsConfig, CodebookConfig, ModelError, SamplerConfig, WorldConfig
from models.dynamics import Dynamics
from models.sampler import Decoder, Finished, Window
from models.text import hashed_words
from models.tokenizer import Tokenizer


class CoTraining(nn.Module):
    """The latent action model by its own loss, and the dynamics on its actions, without gradient between them.

    While the action codes have not begun (their continuous warm-up), only the latent action model trains: there is
    nothing to condition on yet.
    """

    def __init__(self, actions: LatentActionModel, dynamics: Dynamics) -> None:
        super().__init__()
        self.actions, self.dynamics = actions, dynamics

    def begin_step(self, step: int, total_steps: int) -> None:
        """Say where training stands, before the step's forwards."""
        self.actions.begin_step(step, total_steps)
        self.dynamics.begin_step(step, total_steps)

    def end_step(self) -> None:
        """Update codebooks, after the optimizer's step."""
        self.actions.end_step()
        self.dynamics.end_step()

    @override
    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of both losses for batch["frames"] uint8 (B, T, H, W, C), batch["tokens"] (B, T, N), and batch["key"]."""
        codes, observed = self.actions.quantized(batch)
        loss, metrics = self.actions.loss(codes, observed)
        metrics = {f"actions/{name}": value for name, value in metrics.items()}
        if self.training and self.actions.codebook.continuous:
            # every rank has every gradient; a parameter that is elsewhere (ZeRO-3) is empty here, and needs none
            loss = loss + 0.0 * sum(p.sum() for p in self.dynamics.parameters() if p.numel())
        else:
            more, found = self.dynamics({**batch, "actions": codes.codes.detach()})
            loss = loss + more
            metrics |= {f"dynamics/{name}": value for name, value in found.items()}
        return loss, {"loss": loss.detach(), **metrics}


@dataclass(frozen=True)
class State:
    """A moment of a played world. Keep any number of them: stepping an older one branches from it."""

    window: Window
    sampler: SamplerConfig


class World:
    """The tokenizer, the latent action model (None if only its codes are needed) and the dynamics."""

    def __init__(
        self, tokenizer: Tokenizer, actions: LatentActionModel | None, dynamics: Dynamics, fps: float = 10.0
    ) -> None:
        self.tokenizer, self.actions, self.dynamics = tokenizer.eval(), actions, dynamics.eval()
        t = tokenizer.cfg
        watched = (
            actions.eval().cfg
            if actions is not None
            else ActionsConfig(
                height_px=t.height_px, width_px=t.width_px, codebook=CodebookConfig(size=dynamics.cfg.actions, dim=8)
            )
        )
        self.config = WorldConfig(fps=fps, tokenizer=t, actions=watched, dynamics=dynamics.cfg)
        self._players: dict[SamplerConfig, tuple[Decoder, list[Window]]] = {}

    @property
    def action_count(self) -> int:
        """A: actions are 0..A-1."""
        return self.dynamics.cfg.actions

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return self.tokenizer.cfg.height_px, self.tokenizer.cfg.width_px, 3

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.dynamics.head.weight.device

    def prompt_window(self, frames_THWC: Any, seed: int = 0, text: str = "") -> Window:
        """The window of 1..T prompt frames uint8 (array or tensor); actions between them are inferred.

        A world that knows text is told about itself by `text`.

        Raises:
            ModelError: frames have another size, type or count, or several are given without a latent action model.
        """
        frames = torch.as_tensor(frames_THWC).to(self.device)
        if frames.ndim != 4 or not 1 <= len(frames) <= self.config.frames:
            raise ModelError(
                f"a prompt of shape {tuple(frames.shape)}; give (1..{self.config.frames}, {self.frame_shape[0]}, "
                f"{self.frame_shape[1]}, 3)"
            )
        with torch.inference_mode():
            tokens = self.tokenizer.encode(frames[None])
            actions = torch.zeros(0, dtype=torch.int64)
            if len(frames) > 1:
                if self.actions is None:
                    raise ModelError(
                        f"{len(frames)} prompt frames, but this world has no latent action model to infer what "
                        "happened between them; give one frame"
                    )
                actions = self.actions.infer(frames[None], tokens)[0].cpu()
        cfg = self.dynamics.cfg
        words = tuple(hashed_words(text, cfg.words, cfg.text_vocabulary))
        return Window(tokens[0].cpu(), actions, len(frames) - 1, seed, words)

    def start(self, frames_THWC: Any, seed: int = 0, sampler: SamplerConfig | None = None, text: str = "") -> State:
        """Begin from 1..T prompt frames uint8; several carry motion. The sampler stays with the session."""
        return State(self.prompt_window(frames_THWC, seed, text), sampler or SamplerConfig())

    def step(self, state: State, action: int) -> tuple[State, Tensor]:
        """Take an action -> the next state and its frame uint8 (H, W, C), a function of the state and action alone."""
        decoder, held = self._players.setdefault(state.sampler, (Decoder(self, 1, state.sampler), []))
        if not held or held[0] is not state.window:
            decoder.release(0)
            held.clear()
            decoder.restore(0, state.window)
        decoder.begin(0, action)
        finished: list[Finished] = []
        while not finished:
            finished = decoder.advance()
        held[:] = [decoder.window(0)]
        return replace(state, window=held[0]), finished[0].frame

    def ahead(self, state: State) -> list[tuple[State, Tensor]]:
        """What each action would give: (state, frame uint8 (H, W, C)) for 0..A-1, drawn together while a player thinks.

        They share the past, so the batch differs in the last frame alone; each equals what `step` gives.
        """
        decoder = Decoder(self, self.action_count, state.sampler)
        decoder.restore(0, state.window)
        for slot in range(1, self.action_count):
            decoder.fork(0, slot)
        for slot in range(self.action_count):
            decoder.begin(slot, slot)
        found: list[Finished] = []
        while len(found) < self.action_count:
            found += decoder.advance()
        return [(replace(state, window=decoder.window(f.slot)), f.frame) for f in sorted(found, key=lambda f: f.slot)]

    def rollout(self, windows: list[Window], actions_BT: Any, sampler: SamplerConfig) -> Tensor:
        """Play all windows at once with their actions int (B, T) -> frames uint8 (B, T, H, W, C), in host memory."""
        actions = torch.as_tensor(actions_BT)
        decoder = Decoder(self, len(windows), sampler)
        for slot, window in enumerate(windows):
            decoder.restore(slot, window)
        frames = torch.empty(*actions.shape, *self.frame_shape, dtype=torch.uint8)
        for t in range(actions.shape[1]):
            for slot in range(len(windows)):
                decoder.begin(slot, int(actions[slot, t]))
            waiting = len(windows)
            while waiting:
                for done in decoder.advance():
                    frames[done.slot, t] = done.frame
                    waiting -= 1
        return frames

    def save(self, directory: str | Path) -> None:
        """Write tokenizer/, actions/ (if any), dynamics/ and world.json; the last vouches for all."""
        directory = Path(directory)
        parts: dict[str, nn.Module] = {"tokenizer": self.tokenizer, "dynamics": self.dynamics}
        if self.actions is not None:
            parts["actions"] = self.actions
        for name, model in parts.items():
            save_model(directory / name, model)
        write_json(directory / "world.json", {"fps": self.config.fps, "parts": sorted(parts)})

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> "World":
        """The saved world.

        Raises:
            ModelError: a part is missing, damaged, or does not fit the others.
        """
        directory = Path(directory)
        card = read_json(directory / "world.json")
        tokenizer = load_model(directory / "tokenizer", device, "tokenizer")
        dynamics = load_model(directory / "dynamics", device, "dynamics")
        actions = load_model(directory / "actions", device, "actions") if "actions" in card.get("parts", ()) else None
        return cls(tokenizer, actions, dynamics, card["fps"])  # pyrefly: ignore
