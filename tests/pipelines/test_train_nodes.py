"""Simulated Ray nodes that are lost while they train: the run goes on by itself, with the same losses."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from pipelines.jobs import plan_job
from tests.pipelines.nodes import journal
from tests.pipelines.ranks import EACH, config, losses, run_ranks

GOES_ON_S = 180
"""On a machine with much else to do; a quiet one takes a minute at most (docs/training.md)."""


def lost_at(place, what, step, **changes):
    """A training of two workers on two nodes, one of which goes; its journal, and what happened when."""
    settings = config(place, workers=2, **changes)
    command = [sys.executable, "-m", "tests.pipelines.nodes", str(place.path), json.dumps(changes), what, str(step)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ})
    ours = (line for line in made.stdout.splitlines() if line.startswith("{"))  # Ray says things too
    said = {line["did"]: line["time_s"] for line in map(json.loads, ours)}
    assert "trained" in said, made.stdout + made.stderr[-4000:]
    return settings, journal(plan_job(settings)), said


def goes_on_after(lines, moment):
    """Seconds until the first step of the workers that were started after this moment was told of."""
    start = next(line["time_s"] for line in lines if "pid" in line and line["time_s"] > moment)
    took_s = next(line["time_s"] for line in lines if "step" in line and line["time_s"] > start) - moment
    sys.stdout.write(f"steps again after {took_s:.0f} s\n")  # pytest -rP shows it
    return took_s


@pytest.mark.parametrize(
    ("stage", "zero", "seed"), [EACH[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in EACH[1:])]
)
def test_a_lost_node_is_replaced_and_nothing_changes(place, stage, zero, seed):
    changes = {"name": "lost", "stage": stage, "zero": zero, "seed": seed, "steps": 60, "checkpoint_every": 4}
    settings, lines, said = lost_at(place, "replaced", random.Random(seed).randrange(1, 40), **changes)
    assert goes_on_after(lines, said["seen"]) < GOES_ON_S
    still = replace(settings, name="still")
    run_ranks([(still, None)])
    assert losses(plan_job(settings).folder) == losses(plan_job(still).folder)


@pytest.mark.slow
def test_without_a_replacement_fewer_workers_go_on(place):
    few = {"name": "few", "steps": 40, "checkpoint_every": 4, "min_workers": 1}
    settings, lines, said = lost_at(place, "fewer", 7, **few)
    assert goes_on_after(lines, said["seen"]) < GOES_ON_S
    assert [line["world"] for line in lines if "pid" in line] == [2, 1]
    still = replace(settings, name="still", min_workers=None)
    run_ranks([(still, None)])
    assert losses(plan_job(settings).folder) == pytest.approx(losses(plan_job(still).folder), rel=1e-4)


@pytest.mark.slow
def test_a_notice_calls_for_a_checkpoint_at_once_and_another_shortly_before_the_end(place):
    many = {"name": "noticed", "steps": 500, "checkpoint_every": 10_000}
    settings, lines, said = lost_at(place, "drained", 7, **many)
    told = [line["event"] for line in lines if "goes in" in line.get("event", "")]
    assert len(told) == 2, told
    saved = [line["checkpoint"] for line in lines if "checkpoint" in line]
    starts = [line["at"] for line in lines if "pid" in line]
    assert starts == [0, saved[1]]
    assert goes_on_after(lines, said["seen"]) < GOES_ON_S
