"""A world in the terminal: two pixels a character cell, keys 1 to |A|. `lampworks play`."""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator

import cv2
import numpy as np

from infra.config import UserError
from serving.client import Player, WorldClient
from serving.config import PlayConfig
from serving.protocol import Problem

KEYS = "123456789abcdefghijklmnoprstuvwxyz"
"""`q` leaves."""


def play(config: PlayConfig) -> None:
    """Plays until q.

    Raises:
        UserError: this is no terminal, no server answers, or it refuses.
    """
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        raise UserError("lampworks play needs a terminal; scripts use serving.client.WorldClient")
    try:
        with WorldClient(config.url, config.key) as client, _start(client, config) as player, _raw_keys():
            frame = player.frame(player.step_number)
            _show(frame, player, 0.0)
            while (action := _read_key(player.actions)) is not None:
                began = time.perf_counter()
                frame = player.step(action)
                _show(frame, player, time.perf_counter() - began)
    except Problem as error:
        raise UserError(f"{config.url} does not play: {error}") from error


def render(frame_HWC: np.ndarray, columns: int, lines: int) -> str:
    """A frame as text: each cell an upper half block, its colours the pixel above and the pixel below."""
    height, width = frame_HWC.shape[:2]
    scale = min(columns / width, 2 * lines / height)
    size = max(1, int(width * scale)), max(2, int(height * scale) // 2 * 2)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    picture = cv2.resize(frame_HWC, size, interpolation=how)
    rows = []
    for top, bottom in zip(picture[::2], picture[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀" for a, b in zip(top, bottom, strict=True)
        )
        rows.append("".join(cells) + "\x1b[0m\x1b[K")
    return "\r\n".join(rows)


def _start(client: WorldClient, config: PlayConfig) -> Player:
    about = client.models()
    chosen = next((m for m in about if config.model in (m["reference"], m["reference"].split("@")[0])), about[0])
    gallery = next(iter(chosen["gallery"]), None)
    if config.picture is None and gallery is None:
        raise UserError(f"{chosen['reference']} has no gallery: give a first frame with --picture FILE")
    picture = None if config.picture is None else config.picture
    return client.create(
        picture, gallery=None if picture else gallery, seed=config.seed, model=config.model or chosen["reference"]
    )


@contextlib.contextmanager
def _raw_keys() -> Iterator[None]:
    """Keys come one by one and unseen; the screen is put back at the end, whatever happens."""
    before = termios.tcgetattr(sys.stdin)
    sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[2J")
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()


def _read_key(actions: int) -> int | None:
    """The next action asked for; of keys that piled up while a frame was made, the newest. None for q."""
    while True:
        typed = os.read(sys.stdin.fileno(), 1).decode(errors="ignore").lower()
        while select.select([sys.stdin], [], [], 0)[0] and typed != "q":
            typed = os.read(sys.stdin.fileno(), 1).decode(errors="ignore").lower()
        if typed in ("q", ""):
            return None
        if typed in KEYS[:actions]:
            return KEYS.index(typed)


def _show(frame: np.ndarray, player: Player, took_s: float) -> None:
    columns, lines = os.get_terminal_size()
    keys = f"keys {KEYS[0]}-{KEYS[player.actions - 1]} act, q leaves"
    status = f" {player.model} | step {player.step_number} | {took_s * 1e3:.0f} ms | {keys} "
    picture = render(frame, columns, lines - 1)
    sys.stdout.write(f"\x1b[H{picture}\r\n\x1b[0m{status[:columns]}\x1b[K\x1b[J")
    sys.stdout.flush()
