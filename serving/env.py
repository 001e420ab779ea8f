"""A served world as a Gymnasium environment, one or many."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from typing_extensions import override

from serving.client import Picture, Player, WorldClient
from serving.protocol import Problem


class RemoteWorldEnv(gymnasium.Env[np.ndarray, np.int64]):
    """A served world as an environment: no reward, no end but `max_steps`; one session an episode.

    Args:
        url: the server.
        prompt: what `reset` starts from unless its options hold "image" or "gallery"; the first gallery picture by
            default.
        max_steps: steps after which an episode is truncated.
        model: world reference.
        key: API key.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        url: str,
        prompt: Picture | None = None,
        max_steps: int = 160,
        model: str | None = None,
        key: str | None = None,
        render_mode: str | None = "rgb_array",
    ) -> None:
        self._client, self._prompt, self._max_steps = WorldClient(url, key), prompt, max_steps
        served = self._client.models()
        about = next((m for m in served if model in (None, m["reference"], m["reference"].split("@")[0])), None)
        if about is None:
            raise Problem(404, "no-such-model", f"{model!r} is not served: {[m['reference'] for m in served]}")
        self._about, self.render_mode = about, render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (about["height_px"], about["width_px"], 3), np.uint8)
        self.action_space = gymnasium.spaces.Discrete(about["actions"])
        self._player: Player | None = None
        self._frame = np.zeros(self.observation_space.shape, np.uint8)
        self._steps = 0

    @override
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """A new session: the same seed and prompt give the same episode for the same actions."""
        super().reset(seed=seed)
        self._leave()
        asked = options or {}
        picture, gallery = asked.get("image", self._prompt), asked.get("gallery")
        if gallery is None and picture is None:
            gallery = next(iter(self._about["gallery"]), None)
            picture = np.zeros(self._frame.shape, np.uint8) if gallery is None else None
        drawn = int(self.np_random.integers(2**32))
        player = self._client.create(
            None if gallery is not None else picture, gallery=gallery, seed=drawn, model=self._about["reference"]
        )
        self._player, self._steps = player, 0
        self._frame = player.frame(player.step_number)
        return self._frame, {"session": player.id, "step": player.step_number, "model": player.model}

    @override
    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One frame on."""
        if self._player is None:
            raise gymnasium.error.ResetNeeded("call reset before step")
        self._frame = self._player.step(int(action))
        self._steps += 1
        return self._frame, 0.0, False, self._steps >= self._max_steps, {"step": self._player.step_number}

    @override
    def render(self) -> np.ndarray:
        """The newest frame."""
        return self._frame

    @override
    def close(self) -> None:
        """Leaves and removes the session."""
        self._leave()
        self._client.close()

    def _leave(self) -> None:
        if self._player is not None:
            self._player.delete()
            self._player = None


def remote_world_vector(count: int, **options: Any) -> SyncVectorEnv:
    """`count` worlds as one vector environment; options are those of `RemoteWorldEnv`."""
    makers: list[Callable[[], gymnasium.Env]] = [lambda: RemoteWorldEnv(**options)] * count
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
