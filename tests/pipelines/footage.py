"""Small real videos for the tests of curation: scrolling textures in files of every kind."""

import json
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from pipelines.config import CurateConfig
from pipelines.video import write_video


def scroll(frames: int, seed: int = 0, size: int = 64, speed: int = 2, cut_every: int = 0) -> np.ndarray:
    """A camera that moves over a random texture, uint8 (T, size, size, 3); a new texture after each cut."""
    rng = np.random.default_rng(seed)
    out = np.empty((frames, size, size, 3), np.uint8)
    world = _texture(rng, size)
    for t in range(frames):
        if cut_every and t and t % cut_every == 0:
            world = _texture(rng, size)
        x = t * speed % size
        out[t] = world[:, x : x + size]
    return out


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    coarse = rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8)
    tile = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_NEAREST)
    return np.concatenate([tile, tile], axis=1)


def arcade(frames: int, seed: int, screen: int = 0, size: int = 64) -> np.ndarray:
    """A single-screen game: sprites wander over a still background; another seed is another play of the same screen."""
    still = _texture(np.random.default_rng(1000 + screen), size)[:, :size]
    rng = np.random.default_rng(seed)
    sprites = rng.integers(0, 256, (4, 3))
    steps = rng.normal(0, 1.0, (frames, 4, 2)).cumsum(0)
    steps = np.stack([np.convolve(s, np.ones(5) / 5, "same") for s in steps.reshape(frames, 8).T], 1)
    places = np.abs((steps.reshape(frames, 4, 2) * 3 + rng.uniform(0, 100, (4, 2))) % (2 * (size - 10)) - (size - 10))
    out = np.repeat(still[None], frames, axis=0)
    for t, n in np.ndindex(frames, 4):
        y, x = places[t, n].astype(int)
        out[t, y : y + 10, x : x + 10] = sprites[n]
    return out


def drama(frames: int, seed: int, size: int = 64) -> np.ndarray:
    """Film-like footage: soft shapes that drift and change, no grid, no sprites."""
    rng = np.random.default_rng(5000 + seed)
    keys = rng.integers(0, 256, (frames // 20 + 2, 4, 4, 3)).astype(np.float32)
    soft = [cv2.resize(key, (size, size), interpolation=cv2.INTER_CUBIC) for key in keys]
    blend = (soft[t // 20] * (1 - t % 20 / 20) + soft[t // 20 + 1] * (t % 20 / 20) for t in range(frames))
    return np.stack([np.clip(frame, 0, 255) for frame in blend]).astype(np.uint8)


def sidecar(path: Path, **changes) -> None:
    """A yt-dlp sidecar that the paper's rule accepts."""
    info = {
        "id": path.stem,
        "title": f"{path.stem} 2D platformer playthrough",
        "description": "",
        "duration": 20.0,
        "uploader": "someone",
        "webpage_url": f"https://example.org/{path.stem}",
    }
    path.with_name(f"{path.stem}.info.json").write_text(json.dumps({**info, **changes}), encoding="utf-8")


def film(folder: Path, name: str, frames: np.ndarray, fps: int = 20, **info) -> Path:
    """A video with its sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.mp4"
    write_video(path, iter(frames), fps)
    sidecar(path, duration=len(frames) / fps, **info)
    return path


def corpus(folder: Path, good: int = 4) -> Path:
    """A few good videos, and one of each kind that must be refused."""
    for i in range(good):
        film(folder, f"good{i}", scroll(90, seed=i))
    film(folder, "static", np.repeat(scroll(1, seed=90), 90, axis=0))
    film(folder, "black", np.zeros((90, 64, 64, 3), np.uint8))
    film(folder, "short", scroll(20, seed=91))
    film(folder, "wrong", scroll(90, seed=92), title="2D platformer movie, full playthrough")
    film(folder, "half", np.concatenate([scroll(40, seed=93), np.repeat(scroll(1, seed=94), 50, axis=0)]))
    original = folder / "good0.mp4"
    (folder / "copy.mp4").write_bytes(original.read_bytes())
    sidecar(folder / "copy.mp4", duration=4.5)
    (folder / "text.mp4").write_text("no video at all\n" * 50)
    sidecar(folder / "text.mp4", duration=4.5)
    (folder / "cut.mp4").write_bytes(film(folder, "cut", scroll(90, seed=95)).read_bytes()[:3000])
    film(folder, "bare", scroll(90, seed=96)).with_name("bare.info.json").unlink()
    (folder / "unfinished.mp4.part").write_bytes(b"x")
    return folder


EXPECTED = {
    "static": ("rejected", "static"),
    "black": ("rejected", "black"),
    "short": ("rejected", "too_short"),
    "wrong": ("rejected", "negating_word"),
    "half": ("partial", "static"),
    "copy": ("kept", ""),
    "text": ("dead_letter", "unreadable"),
    "cut": ("dead_letter", "unreadable"),
    "bare": ("rejected", "no_sidecar"),
    "good0": ("duplicate", "same_bytes"),
}
"""Outcome and reason of each unwanted file of `corpus`; "copy" sorts before "good0", so it is the original."""


def settings(home: Path, source: Path, **changes) -> CurateConfig:
    """Small clips, small units: many commits from little footage."""
    from pipelines.config import FilterConfig, RulesConfig

    values = {
        "home": home,
        "source": source,
        "name": "small",
        "width_px": 32,
        "height_px": 32,
        "clip_frames": 20,
        "unit_s": 10.0,
        "workers": 2,
        "rules": RulesConfig(min_duration_s=0.5),
        "filters": FilterConfig(),
    }
    return CurateConfig(**{**values, **changes})


def film_as(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    fps: Fraction = Fraction(20),
    times_s: list[float] | None = None,
    rotation: int = 0,
    start_s: float = 0.0,
    **options: str,
) -> Path:
    """A video in any container, codec, pixel format, timing and rotation, with a good sidecar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = times_s if times_s is not None else [n / float(fps) for n in range(len(frames))]
    tick = Fraction(1, 90000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        if times_s is not None:
            stream.codec_context.time_base = tick
        if rotation:
            stream.set_display_rotation(rotation)
        for number, (frame, at) in enumerate(zip(frames, times, strict=True)):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            if times_s is None and not start_s:
                picture.pts, picture.time_base = number, 1 / fps
            else:
                picture.pts, picture.time_base = round((at + start_s) / tick), tick
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    sidecar(path, duration=float(times[-1]))
    return path


def sound(path: Path, cover: bytes = b"") -> Path:
    """A sound file, with a cover picture if given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        picture = None
        if cover:
            picture = container.add_stream("png", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 64, "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
        for n in range(200):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, n * 1024
            container.mux(stream.encode(frame))
        if picture is not None:
            still = av.VideoFrame.from_ndarray(scroll(1)[0], format="rgb24")
            still.pts, still.time_base = 0, Fraction(1)
            container.mux(picture.encode(still))
            container.mux(picture.encode())
        container.mux(stream.encode())
    sidecar(path)
    return path
