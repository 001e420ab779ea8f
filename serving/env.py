"""A served world as a Gymnasium environment, one or many."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import gymnasium
import numpy as np
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from typing_extensions import override

from serving.client import AsyncPlayer, Picture, Player, WorldClient
from serving.protocol import Problem

T = TypeVar("T")


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
        self._client, self.prompt, self.max_steps = WorldClient(url, key), prompt, max_steps
        served = self._client.models()
        about = next((m for m in served if model in (None, m["reference"], m["reference"].split("@")[0])), None)
        if about is None:
            raise Problem(404, "no-such-model", f"{model!r} is not served: {[m['reference'] for m in served]}")
        self.about, self.render_mode = about, render_mode
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
        picture, gallery = _first_frame(options or {}, self.prompt, self.about)
        drawn = int(self.np_random.integers(2**32))
        model = self.about["reference"]
        player = self._client.create(picture, gallery=gallery, seed=drawn, model=model)
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
        return self._frame, 0.0, False, self._steps >= self.max_steps, {"step": self._player.step_number}

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


class RemoteWorldVectorEnv(gymnasium.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many worlds that step together: their steps are asked for at once, so the server computes them as one batch.

    Episodes have one length, so all end together; the step after that starts them anew (Gymnasium's NEXT_STEP).

    Args:
        count: how many worlds.
        url: the server.
        options: the other arguments of `RemoteWorldEnv`.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_fps": 10}

    def __init__(self, count: int, url: str, **options: Any) -> None:
        one = RemoteWorldEnv(url, **options)
        self._about, self._prompt, self._max_steps = one.about, one.prompt, one.max_steps
        one.close()
        self.num_envs, self._url, self._key = count, url, options.get("key")
        self.single_observation_space, self.single_action_space = one.observation_space, one.action_space
        self.observation_space = batch_space(one.observation_space, count)
        self.action_space = batch_space(one.action_space, count)
        self._players: list[AsyncPlayer] = []
        self._steps = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="worlds", daemon=True)
        self._thread.start()

    @override
    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """New sessions; world i of seed s is the session of `RemoteWorldEnv` with seed s + i."""
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = seed
        if not self._players or seed is not None:
            self._draws = [np_random(s)[0] for s in seeds]
        return self._run(self._start(options or {})), {}

    @override
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One frame on in every world."""
        if not self._players:
            raise gymnasium.error.ResetNeeded("call reset before step")
        nothing, never = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        if self._steps >= self._max_steps:
            return self._run(self._start({})), nothing, never, never, {}
        frames = self._run(self._step(actions))
        self._steps += 1
        ended = np.full(self.num_envs, self._steps >= self._max_steps)
        return frames, nothing, never, ended, {}

    @override
    def close_extras(self, **kwargs: Any) -> None:
        """Leaves and removes the sessions."""
        self._run(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, options: dict[str, Any]) -> np.ndarray:
        await self._leave()
        picture, gallery = _first_frame(options, self._prompt, self._about)
        more: dict[str, Any] = {"gallery": gallery, "model": self._about["reference"], "key": self._key}
        seeds = [int(draw.integers(2**32)) for draw in self._draws]
        self._players = await asyncio.gather(
            *(AsyncPlayer.create(self._url, picture, seed=seed, **more) for seed in seeds)
        )
        self._steps = 0
        return np.stack(await asyncio.gather(*(player.frame(player.step_number) for player in self._players)))

    async def _step(self, actions: np.ndarray) -> np.ndarray:
        steps = (player.step(int(action)) for player, action in zip(self._players, actions, strict=True))
        return np.stack(await asyncio.gather(*steps))

    async def _leave(self) -> None:
        await asyncio.gather(*(player.delete() for player in self._players))
        self._players.clear()


def _first_frame(
    options: dict[str, Any], prompt: Picture | None, about: dict[str, Any]
) -> tuple[Picture | None, str | None]:
    """What an episode starts from, a picture or a gallery id: its options say, or the prompt, or the first picture."""
    picture, gallery = options.get("image", prompt), options.get("gallery")
    if gallery is None and picture is None:
        gallery = next(iter(about["gallery"]), None)
        picture = np.zeros((about["height_px"], about["width_px"], 3), np.uint8)
    return (picture, None) if gallery is None else (None, gallery)
