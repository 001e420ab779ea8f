"""Plays real 2D games and writes what a crawl would hold: videos, sidecars, and some that nobody wants.

lampworks record --episodes 60
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from infra.config import Home, UserError
from pipelines.config import RecordConfig
from pipelines.video import write_video

log = logging.getLogger(__name__)

COMBOS = (  # procgen's fifteen actions, in its own order (procgen.env.get_combos)
    "LEFT+DOWN", "LEFT", "LEFT+UP", "DOWN", "NOTHING", "UP", "RIGHT+DOWN", "RIGHT", "RIGHT+UP",
    "D", "A", "W", "S", "Q", "E",
)  # fmt: skip
POLICY = {"RIGHT": 0.32, "RIGHT+UP": 0.30, "UP": 0.10, "LEFT": 0.12, "LEFT+UP": 0.06, "NOTHING": 0.06, "DOWN": 0.04}
SLOTS_PER_SECOND = 10
SCREEN_PX = 64


@dataclass(frozen=True)
class Episode:
    """One file to write: which game is played, how long, how it is shown, and what it pretends to be."""

    video_id: str
    kind: str
    game: str
    title: str
    seed: int
    duration_s: float
    rate_fps: int
    scale: int


def record(config: RecordConfig) -> list[Path]:
    """Writes every episode that is not there yet; a killed run is simply run again.

    Args:
        config: what to play; equal configs give equal pictures and actions.
    Returns:
        The video files, sorted.
    Raises:
        UserError: the game is unknown or the simulator is not installed.
    """
    _check_games(config)
    folder = Home(config.home).ensure().raw
    folder.mkdir(parents=True, exist_ok=True)
    episodes = plan(config)
    missing = [e for e in episodes if not _written(folder, e)]
    log.info("record | %d files | %d to write | %s", len(episodes), len(missing), folder)
    first = [e for e in missing if e.kind != "copy"]
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_write, folder, config, e) for e in first]
        for done, job in enumerate(as_completed(jobs), 1):
            log.info("record | %d/%d | %s", done, len(first), job.result())
    for episode in (e for e in missing if e.kind == "copy"):
        _write_copy(folder, episode, episodes[0])
    return sorted(_path(folder, e) for e in episodes)


def plan(config: RecordConfig) -> list[Episode]:
    """Every file of a recording, in order; drawn from the seed alone."""
    games = [config.game] * config.episodes + [g for g in config.side_games for _ in range(config.side_episodes)]
    episodes = [_episode(config, i, "play", game) for i, game in enumerate(games)]
    if config.unwanted:
        kinds = ["static", "wrong", "broken", "truncated", "bare"] + ["copy"] * bool(episodes)
        for i, kind in enumerate(kinds):
            game = "bigfish" if kind == "wrong" else config.game
            episodes.append(_episode(config, 1_000_000 + i, kind, game))
    return episodes


def _episode(config: RecordConfig, index: int, kind: str, game: str) -> Episode:
    key = hashlib.sha256(f"{config.seed}/{index}/{kind}/{game}".encode()).hexdigest()
    rng = np.random.default_rng(int(key[:16], 16))
    tenths = rng.integers(round(config.min_s * 10), round(config.max_s * 10) + 1)
    return Episode(
        video_id=f"{game[:4]}{key[:7]}",
        kind=kind,
        game=game,
        title=_title(kind, game, index),
        seed=int(rng.integers(2**31 - 1)),
        duration_s=float(tenths) / 10,
        rate_fps=int(rng.choice(config.rates_fps)),
        scale=int(rng.choice(config.scales)),
    )


def _title(kind: str, game: str, index: int) -> str:
    if kind == "wrong":
        return "Big Fish aquarium feeding, relaxing ambience"
    style = ("playthrough", "speedrun", "let's play", "full walkthrough")[index % 4]
    return f"{game.capitalize()} 2D platformer {style} part {index % 1_000_000 + 1}"


def _check_games(config: RecordConfig) -> None:
    try:
        from procgen.env import ENV_NAMES
    except ImportError as error:
        raise UserError(
            f"the game simulator is not installed ({error}): run `make setup`, which installs procgen"
        ) from error
    for game in (config.game, *config.side_games):
        if game not in ENV_NAMES:
            raise UserError(f"no game is called {game!r}: choose from {', '.join(ENV_NAMES)}")


# -- playing -----------------------------------------------------------------------------------------------------


def held_actions(rng: np.random.Generator, slots: int, max_hold: int) -> np.ndarray:
    """The action of every tenth of a second, int16 (slots,): held for 1..max_hold slots, biased to the right."""
    names, weights = list(POLICY), np.array(list(POLICY.values()))
    lengths = rng.integers(1, max_hold + 1, size=slots)
    codes = np.array([COMBOS.index(n) for n in names], np.int16)
    drawn = codes[rng.choice(len(names), size=slots, p=weights / weights.sum())]
    return np.repeat(drawn, lengths)[:slots]


def play(config: RecordConfig, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """Plays one episode.

    Returns:
        states: uint8 (steps, 64, 64, 3), the screen before each game step; actions: int16 (steps,), taken there.
    """
    from procgen import ProcgenGym3Env

    rng = np.random.default_rng(episode.seed)
    per_slot = config.steps_per_second // SLOTS_PER_SECOND
    slots = round(episode.duration_s * SLOTS_PER_SECOND)
    actions = np.repeat(held_actions(rng, slots, config.max_hold), per_slot)
    env = ProcgenGym3Env(
        num=1,
        env_name=episode.game,
        distribution_mode=config.distribution_mode,
        use_backgrounds=config.use_backgrounds,
        restrict_themes=config.restrict_themes,
        num_levels=0,
        start_level=episode.seed,
        rand_seed=episode.seed,
        num_threads=0,
    )
    states = np.empty((len(actions), SCREEN_PX, SCREEN_PX, 3), np.uint8)
    for step, action in enumerate(actions):
        states[step] = env.observe()[1]["rgb"][0]
        env.act(np.array([action], np.int32))
    env.close()
    return states, actions


# -- writing -----------------------------------------------------------------------------------------------------


def _path(folder: Path, episode: Episode) -> Path:
    return folder / f"{episode.video_id}.mp4"


def _written(folder: Path, episode: Episode) -> bool:
    """The video is moved into place last, so that it vouches for its sidecars."""
    return _path(folder, episode).exists()


def _write(folder: Path, config: RecordConfig, episode: Episode) -> str:
    states, actions = play(config, episode)
    if episode.kind == "static":
        states[:] = states[0]
    at_step = np.arange(round(episode.duration_s * episode.rate_fps)) * config.steps_per_second // episode.rate_fps
    target, draft = _path(folder, episode), folder / f".{episode.video_id}.part"
    write_video(draft, _enlarged(states, at_step, episode.scale), episode.rate_fps, crf=config.crf)
    _damage(draft, episode)
    if episode.kind != "bare":
        _sidecar(folder, episode)
    if episode.kind == "play":
        times_s = np.arange(len(at_step)) / episode.rate_fps
        _atomically(folder / f"{episode.video_id}.actions.npz", times_s=times_s, action=actions[at_step])
    draft.replace(target)
    return target.name


def _enlarged(states: np.ndarray, at_step: np.ndarray, scale: int) -> Iterator[np.ndarray]:
    shown, picture = -1, states[0]
    for step in at_step:
        if step != shown:
            shown, picture = step, states[step].repeat(scale, axis=0).repeat(scale, axis=1)
        yield picture


def _damage(path: Path, episode: Episode) -> None:
    if episode.kind == "broken":
        path.write_bytes(np.random.default_rng(episode.seed).bytes(50_000))
    elif episode.kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write_copy(folder: Path, episode: Episode, original: Episode) -> None:
    """A byte-identical upload of another episode, under its own name."""
    _sidecar(folder, episode)
    draft = folder / f".{episode.video_id}.part"
    draft.write_bytes(_path(folder, original).read_bytes())
    draft.replace(_path(folder, episode))


def _sidecar(folder: Path, episode: Episode) -> None:
    info: dict[str, Any] = {
        "id": episode.video_id,
        "title": episode.title,
        "description": f"Recorded gameplay of {episode.game}, no commentary.",
        "tags": [episode.game, "gameplay"],
        "duration": episode.duration_s,
        "uploader": f"player{episode.seed % 7}",
        "webpage_url": f"https://example.org/watch?v={episode.video_id}",
        "recording": asdict(episode),
    }
    draft = folder / f".{episode.video_id}.info"
    draft.write_text(json.dumps(info, indent=1), encoding="utf-8")
    draft.replace(folder / f"{episode.video_id}.info.json")


def _atomically(path: Path, **arrays: np.ndarray) -> None:
    draft = path.with_name(f".{path.name}.part")
    with draft.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    draft.replace(path)
