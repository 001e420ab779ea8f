"""The doors in a process of their own, so that their memory can be measured. `python -m tests.serving.apart HOME`"""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import torch

from infra.config import Home
from models.world import World
from serving.config import Limits
from serving.engine import Engine
from tests.serving.conftest import SAMPLER, gateway_of


class Apart:
    """A running server: its URL, and what memory it takes."""

    def __init__(self, url, pid):
        self.url, self._status = url, Path(f"/proc/{pid}/status")
        self._clear = Path(f"/proc/{pid}/clear_refs")

    def forget_peak(self):
        """Peak memory counts from now on."""
        self._clear.write_text("5")

    def megabytes(self, what="VmHWM"):
        """Peak resident memory (VmHWM) or resident memory now (VmRSS)."""
        line = next(text for text in self._status.read_text().splitlines() if text.startswith(what))
        return int(line.split()[1]) / 1024


@contextlib.contextmanager
def apart(home):
    command = [sys.executable, "-m", "tests.serving.apart", str(home.path)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Apart(server.stdout.readline().strip(), server.pid)
    finally:
        server.stdin.close()
        server.wait(30)


def main(home):
    torch.set_num_threads(1)
    engine = Engine(World.load(home.artifacts / "toy" / "v1"), reference="toy@v1", sampler=SAMPLER, slots=4)
    engine.warm_up()
    limits = Limits(creates_per_min=10**6, idle_s=3600)
    with gateway_of(home, engine, home.path / f"apart-{time.time_ns()}.db", limits=limits) as url:
        sys.stdout.write(url + "\n")
        sys.stdout.flush()
        sys.stdin.read()
    engine.close()


if __name__ == "__main__":
    main(Home(Path(sys.argv[1])))
