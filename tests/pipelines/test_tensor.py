"""Tensor parallelism in plain torch processes: the same numbers as one process that holds every matrix whole."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from infra.config import UserError
from models.cost import on_meta
from pipelines.jobs import plan_job
from pipelines.paper import genie_11b_training
from pipelines.stages import build, estimate
from pipelines.tensor import settings, split_parameters
from pipelines.train import train
from tests.pipelines.conftest import copy_of
from tests.pipelines.ranks import STAGES, config, losses, run_ranks
from tests.pipelines.test_paper import scaled_down


def shared(home, name, **changes):
    """Two workers that share every matrix."""
    return config(home, name=name, **{"workers": 2, "tensor": 2, **changes})


def curve(settings, name="loss"):
    return losses(plan_job(settings).folder, name)


@pytest.fixture(scope="module")
def runs(ground, tmp_path_factory):
    """Each stage in a group of two; two groups of two with ZeRO-2; one that dies; one that changes its shape."""
    home = copy_of(ground, tmp_path_factory.mktemp("tensor") / "home")
    broken, alone = shared(home, "broken", stage="world"), shared(home, "alone", stage="world")
    run_ranks([*((shared(home, stage, stage=stage), None) for stage in STAGES), (broken, 3), (alone, 3)])
    run_ranks([(broken, None)])
    run_ranks([(replace(alone, workers=1, tensor=1), None)], world=1)
    run_ranks([(shared(home, "four", stage="world", workers=4, zero=2), None)], world=4)
    return home


@pytest.mark.parametrize("stage", STAGES)
def test_a_group_computes_what_one_process_computes(runs, stage):
    plain = config(runs, name="plain", stage=stage)
    made = train(plain)
    whole = shared(runs, stage, stage=stage)
    assert curve(whole) == pytest.approx(curve(plain), rel=1e-5)
    assert curve(whole, "grad_norm") == pytest.approx(curve(plain, "grad_norm"), rel=1e-4)
    for file in sorted(made.path.rglob("model.safetensors")):
        theirs = load_file(plan_job(whole).folder / "result" / file.relative_to(made.path))
        for name, value in load_file(file).items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4, msg=f"{file.parent.name} {name}")


def test_two_groups_share_the_samples_and_the_optimizer(runs):
    four = shared(runs, "four", stage="world", workers=4, zero=2)
    assert curve(four) == pytest.approx(curve(shared(runs, "world", stage="world")), rel=1e-5)
    assert set(curve(four, "world").values()) == {4}


def test_a_group_that_died_goes_on_bit_by_bit(runs):
    assert curve(shared(runs, "broken", stage="world")) == curve(shared(runs, "world", stage="world"))


def test_a_group_s_checkpoint_goes_on_without_the_group(runs):
    alone = curve(shared(runs, "alone", stage="world"))
    assert alone == pytest.approx(curve(shared(runs, "world", stage="world")), rel=1e-5)


def test_the_final_training_scaled_down_trains_in_a_group(place):
    """bf16, recomputation, grouped K/V, accumulation, clipping, co-training; without the average, which is refused."""
    given = scaled_down(place, "group")
    learning = replace(given.optimizer, ema_decay=0.0)
    group = replace(given, optimizer=learning, tensor=2, steps=6, picture_every=0)
    plain = replace(group, name="plain", tensor=1)
    run_ranks([(group, None)])  # DeepSpeed keeps one division into groups for a process
    run_ranks([(plain, None)])
    assert curve(group) == pytest.approx(curve(plain), rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor": 2, "workers": 3, "batch": 12}, "does not divide 3 workers"),
        ({"tensor": 2, "workers": 0}, "--tensor is 2"),
        ({"tensor": 2, "zero": 3}, "goes with --zero 1 or 2, not 3"),
        ({"tensor": 2, "stage": "quality"}, "is not for the stage quality"),
        ({"tensor": 2, "min_workers": 1}, "does not go with --min-workers"),
        (
            {"tensor": 2, "workers": 4, "batch": 12, "micro_batch": 4},
            "12 is not a multiple of --micro-batch 4 x 2 groups",
        ),
    ],
)
def test_what_a_group_can_t_do_is_said(ground, changes, said):
    with pytest.raises(UserError, match=said):
        config(ground, **{"workers": 2, **changes})


def test_a_block_that_can_t_be_shared_is_named(ground):
    with pytest.raises(UserError, match="--tensor 8 does not divide the 36 heads of transformer.blocks.0"):
        estimate(one := replace(genie_11b_training(), tensor=8), one.model)
    with pytest.raises(UserError, match="--tensor 3 does not divide the 128 hidden features of encoder"):
        settings(build(plan_job(config(ground))), 3)


def test_a_dry_run_counts_what_a_group_shares():
    """The dynamics' and actions' blocks are nearly all of their 9.9 B parameters."""
    one = genie_11b_training()
    two = replace(one, tensor=2)
    model = on_meta(one.model.dynamics)
    assert 0.98 < split_parameters(model, 2) / sum(p.numel() for p in model.parameters()) < 1
    whole, half = estimate(one, one.model), estimate(two, two.model)
    assert half.state_bytes(0) / whole.state_bytes(0) == pytest.approx(0.5, abs=0.01)
    said = "\n".join(half.lines(None, 0.4))
    assert "groups of 2 x 2 windows x 8 accumulated" in said
    assert "ZeRO-2" in said and "ZeRO-3" not in said, "what a group can't do is not offered"
    with pytest.raises(UserError, match="use --zero 2"):
        half.check(1, 0.5 * (half.worker_bytes(1) + half.worker_bytes(2)), "a worker")
    with pytest.raises(UserError, match="use more workers"):
        half.check(2, 0.9 * half.worker_bytes(2), "a worker")
