"""THE PATH, raw video -> report: one list of steps that the demo, the tests and a 30,000-hour run share.

Every step is finished work with a name (a dataset version, an artifact): a step that finds its work done returns at
once, and one that was killed continues. So walking the path again is how it is resumed.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from infra.cluster import connect
from infra.config import Home
from pipelines.config import PathConfig

log = logging.getLogger(__name__)


@dataclass
class Walk:
    """What the steps have made so far: step name -> reference or path."""

    config: PathConfig
    made: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One arrow of the path."""

    name: str
    what: str
    run: Callable[[Walk], str]
    """Does the work and returns the reference or path of what it made."""


def _record(walk: Walk) -> str:
    from pipelines.gameplay import record

    videos = record(replace(walk.config.record, home=walk.config.home))
    return f"{len(videos)} files in {Home(walk.config.home).raw}"


def _curate(walk: Walk) -> str:
    from pipelines.curate import curate

    return curate(replace(walk.config.curate, home=walk.config.home)).reference


def _tokenizer(walk: Walk) -> str:
    from pipelines.train import train

    return train(replace(walk.config.tokenizer, home=walk.config.home, dataset=walk.made["curate"])).reference


def _tokenize(walk: Walk) -> str:
    from pipelines.tokenize import tokenize

    made = walk.made
    config = replace(walk.config.tokenize, home=walk.config.home, dataset=made["curate"], tokenizer=made["tokenizer"])
    table = tokenize(config)
    return f"{table.dataset} in tokens of {table.tokenizer}"


def _world(walk: Walk) -> str:
    from pipelines.train import train

    made = walk.made
    config = replace(walk.config.world, home=walk.config.home, dataset=made["curate"], tokenizer=made["tokenizer"])
    return train(config).reference


def _evaluate(walk: Walk) -> str:
    from pipelines.evaluate import evaluate

    return evaluate(replace(walk.config.evaluate, home=walk.config.home, world=walk.made["world"])).reference


def _report(walk: Walk) -> str:
    from pipelines.report import report

    return str(report(replace(walk.config.report, home=walk.config.home, evaluation=walk.made["evaluate"])))


STEPS = (
    Step("record", "play games, write ordinary videos", _record),
    Step("curate", "videos -> clips, with a reason for every refusal (Ray Data)", _curate),
    Step("tokenizer", "clips -> a video tokenizer (Ray Train, DeepSpeed)", _tokenizer),
    Step("tokenize", "clips -> tokens (Ray Data)", _tokenize),
    Step("world", "clips, tokens -> latent actions and dynamics, co-trained (Ray Train, DeepSpeed)", _world),
    Step("evaluate", "the world against held-out clips", _evaluate),
    Step("report", "one page about all of it", _report),
)


def walk(config: PathConfig) -> dict[str, str]:
    """Takes every step in order on one Ray cluster; returns what each made, by the step's name.

    Raises:
        UserError: a step refuses its input; what was done before it stays done.
    """
    Home(config.home).ensure()
    state = Walk(config)
    with connect(config.cluster):
        for number, step in enumerate(STEPS, 1):
            log.info("[%d/%d] %s: %s", number, len(STEPS), step.name, step.what)
            start = time.monotonic()
            state.made[step.name] = step.run(state)
            log.info(
                "[%d/%d] %s: %s | %.0f s",
                number,
                len(STEPS),
                step.name,
                state.made[step.name],
                time.monotonic() - start,
            )
    return state.made
