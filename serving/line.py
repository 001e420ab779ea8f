"""Places that are taken and given back, and a line before them: first come, first served, and told where it stands."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from serving.protocol import Problem

TELL_S = 2.0
"""How often those who wait are told their position; who has left is noticed by it."""
RETRY_S = 15.0
"""When to come back to a full line."""
PATIENCE_S = 1.0
"""Longest wait for a turn."""
REMEMBERED = 4096
"""Names after which those whose turn has come are forgotten."""


class Line:
    """A number of places and a bounded line.

    Args:
        what: whose places these are, for the refusal, such as "players".
        places: most at once.
        longest: most who wait; the next is refused.
    """

    def __init__(self, what: str, places: int, longest: int) -> None:
        self.what, self.places, self.longest = what, places, longest
        self.taken = 0
        self._waiting: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def place(self, tell: Callable[[int], Awaitable[None]] | None = None) -> AsyncIterator[None]:
        """Holds a place for the time of the block.

        Args:
            tell: called with the position in the line, 1 is next, now and then while waiting.

        Raises:
            Problem: 429 with position and limit when the line is full too.
        """
        if self.taken < self.places and not self._waiting:
            self.taken += 1
        else:
            await self._wait(tell)
        try:
            yield
        finally:
            self._give_back()

    async def _wait(self, tell: Callable[[int], Awaitable[None]] | None) -> None:
        position = len(self._waiting) + 1
        if position > self.longest:
            raise Problem(
                429, "server-full", f"{self.places} {self.what} are served and {self.longest} wait: retry in "
                f"{RETRY_S:g} s", retry_after_s=RETRY_S, limit=self.places, position=position,
            )  # fmt: skip
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            while not turn.done():
                if tell:
                    await tell(self._waiting.index(turn) + 1)
                await asyncio.wait([turn], timeout=TELL_S)
        except BaseException:
            if turn in self._waiting:
                self._waiting.remove(turn)
            else:  # its turn came while it left
                self._give_back()
            raise

    def _give_back(self) -> None:
        if self._waiting:
            self._waiting.pop(0).set_result(None)  # the place changes hands
        else:
            self.taken -= 1


class Pace:
    """Turns at a steady rate for each of many names: who is early waits, who is far too early is refused.

    Args:
        per_s: turns of one name in a second.
    """

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self._next: dict[str, float] = {}

    async def turn(self, name: str) -> None:
        """Returns when it is the name's turn.

        Raises:
            Problem: 429 when that would be in more than `PATIENCE_S`.
        """
        now = time.monotonic()
        at = max(now, self._next.get(name, 0.0))
        if at - now > PATIENCE_S:
            raise Problem(
                429, "too-many-steps", f"more than {self.per_s:g} steps a second", retry_after_s=1, limit=self.per_s
            )
        if len(self._next) > REMEMBERED:
            self._next = {other: due for other, due in self._next.items() if due > now}
        self._next[name] = at + 1 / self.per_s
        await asyncio.sleep(at - now)
