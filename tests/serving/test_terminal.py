"""`lampworks play` in a real pseudo-terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time

import numpy as np
import pytest

from infra.config import UserError
from serving.config import PlayConfig
from serving.terminal import play, render


def read_until(master, pattern, seconds=30):
    text, deadline = "", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.5)[0]:
            text += os.read(master, 65536).decode(errors="ignore")
        if re.search(pattern, text):
            return text
    raise AssertionError(f"{pattern!r} did not come: {text[-300:]!r}")


def test_keys_step_the_world_and_q_leaves(local):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (30, 100))
    code = "from serving.terminal import play; from serving.config import PlayConfig; play(PlayConfig(url=%r, seed=1))"
    ends = {"stdin": slave, "stdout": slave, "stderr": slave}
    player = subprocess.Popen([sys.executable, "-c", code % local], **ends, start_new_session=True)
    try:
        assert "▀" in read_until(master, r"toy@v1 \| step 0")
        for step in (1, 2):
            os.write(master, b"2")
            read_until(master, rf"step {step} \| \d+ ms")
        os.write(master, b"9xq")
        read_until(master, re.escape("\x1b[?1049l"))
        assert player.wait(20) == 0
    finally:
        player.kill()
        player.wait()
        os.close(master)
        os.close(slave)


def test_a_frame_fills_the_terminal_two_pixels_a_cell():
    frame = np.zeros((4, 4, 3), np.uint8)
    frame[0], frame[1] = (255, 0, 0), (0, 0, 255)
    rows = render(frame, 4, 2).split("\r\n")
    assert len(rows) == 2
    assert rows[0].count("▀") == 4
    assert "38;2;255;0;0;48;2;0;0;255m" in rows[0]
    assert render(frame, 200, 50).count("▀") == 100 * 50


def test_without_a_terminal_it_says_what_to_use():
    with pytest.raises(UserError, match="needs a terminal"):
        play(PlayConfig())
