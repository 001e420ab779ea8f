"""Places, the line before them, and turns at a rate."""

import asyncio
import random
import time

import pytest

from serving.line import Line, Pace
from serving.protocol import Problem


def test_who_comes_first_is_served_first():
    async def crowd():
        line, order = Line("seats", 2, 10), []

        async def visit(number):
            async with line.place():
                order.append(number)
                await asyncio.sleep(0.01)

        tasks = []
        for number in range(8):
            tasks.append(asyncio.create_task(visit(number)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        return line, order

    line, order = asyncio.run(crowd())
    assert order == list(range(8))
    assert line.taken == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_place_is_lost_or_given_twice_whoever_leaves_when(seed):
    rng = random.Random(seed)

    async def crowd():
        line, inside, most = Line("seats", 3, 100), 0, 0

        async def visit():
            nonlocal inside, most
            async with line.place():
                inside += 1
                most = max(most, inside)
                try:
                    await asyncio.sleep(rng.random() / 200)
                finally:
                    inside -= 1

        tasks = [asyncio.create_task(visit()) for _ in range(60)]
        for task in rng.sample(tasks, 30):
            await asyncio.sleep(rng.random() / 500)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return line, most

    line, most = asyncio.run(crowd())
    assert (line.taken, most) == (0, 3)


def test_a_full_line_is_a_refusal_with_numbers():
    async def crowd():
        line = Line("seats", 1, 1)
        async with line.place():
            waiting = asyncio.create_task(line.place().__aenter__())
            await asyncio.sleep(0)
            with pytest.raises(Problem, match="1 seats are served and 1 wait: retry in 15 s") as refused:
                async with line.place():
                    pass
            waiting.cancel()
        return refused.value

    problem = asyncio.run(crowd())
    assert (problem.status, problem.extra, problem.headers()["retry-after"]) == (429, {"limit": 1, "position": 2}, "15")


def test_turns_come_at_a_rate_and_each_name_has_its_own():
    async def play():
        pace = Pace(100)
        began = time.monotonic()
        for _ in range(20):
            await pace.turn("one")
        took = time.monotonic() - began
        await asyncio.wait_for(pace.turn("other"), 0.1 + took)
        many = [asyncio.create_task(pace.turn("crowd")) for _ in range(150)]
        outcomes = await asyncio.gather(*many, return_exceptions=True)
        return took, outcomes

    took, outcomes = asyncio.run(play())
    assert took >= 0.19
    refused = [o for o in outcomes if isinstance(o, Problem)]
    assert 1 <= len(refused) < 60, "who would wait for more than a second is told so"
    assert refused[0].extra == {"limit": 100}
