"""Numerics of DeepSpeed's engines in two plain torch processes: the same loop, batches and checkpoints, without Ray."""

from dataclasses import replace

import pytest

from infra.config import UserError
from pipelines.checkpoints import Checkpoints
from pipelines.stages import build, plan_job
from pipelines.train import train
from pipelines.zero import PlainEngine, make_optimizer, parameter_groups
from tests.pipelines.conftest import copy_of
from tests.pipelines.ranks import config, killed, losses, run_ranks

STAGES = ("tokenizer", "actions", "dynamics", "world")
ZERO = (0, 1, 2, 3)
HARD = {
    "half": {"precision": "bf16"},
    "offloaded": {"offload": True},
    "both": {"precision": "bf16", "offload": True},
    "spiky": {"spike_factor": 1.0, "steps": 24},
}
"""What two workers do besides; `spiky` leaves out each step whose loss or norm is above the median."""


def on_ranks(home, name, zero, **changes):
    return config(home, name=f"{name}{zero}", zero=zero, workers=2, **changes)


def read(settings, name="loss"):
    return losses(plan_job(settings).folder, name)


@pytest.fixture(scope="module")
def runs(ground, tmp_path_factory):
    """Whole runs; runs that die and go on; runs on 2, then 1, then 2 workers. Three starts of the processes for all."""
    home = copy_of(ground, tmp_path_factory.mktemp("zero") / "home")
    names = ("whole", "broken", "elastic")
    whole, broken, elastic = ([on_ranks(home, name, z) for z in ZERO] for name in names)
    world = [on_ranks(home, "world", 1, stage="world")]
    kinds = [on_ranks(home, name, z, **HARD[name]) for name in HARD for z in ZERO if z or name == "spiky"]
    run_ranks([(c, None) for c in whole + world] + [(c, 3) for c in broken] + [(c, 2) for c in elastic])
    run_ranks([(c, 4) for c in elastic], world=1)
    run_ranks([(c, None) for c in broken + elastic + kinds] + [(again(c), c.steps - 3) for c in kinds])
    run_ranks([(again(c), None) for c in kinds])
    return home


def again(settings):
    """The same training under a name of its own, to die and go on."""
    return replace(settings, name=f"{settings.name}-again")


def test_every_zero_stage_computes_what_one_process_computes(runs):
    plain = config(runs, name="plain")
    train(plain)
    for zero in ZERO:
        whole = on_ranks(runs, "whole", zero)
        assert read(whole) == pytest.approx(read(plain), rel=1e-5)
        assert read(whole, "grad_norm") == pytest.approx(read(plain, "grad_norm"), rel=1e-4)


def test_co_training_on_two_ranks_computes_what_one_process_computes(runs):
    plain = config(runs, name="plain", stage="world")
    train(plain)
    assert read(on_ranks(runs, "world", 1, stage="world")) == pytest.approx(read(plain), rel=1e-5)


@pytest.mark.parametrize("zero", ZERO)
def test_a_run_that_died_goes_on_bit_by_bit(runs, zero):
    assert read(on_ranks(runs, "broken", zero)) == read(on_ranks(runs, "whole", zero))


@pytest.mark.parametrize("zero", ZERO)
def test_two_workers_then_one_then_two_see_the_same_and_learn_the_same(runs, zero):
    """The loop itself proves the samples; the sums of gradients are taken in another order, hence the tolerance."""
    elastic = on_ranks(runs, "elastic", zero)
    assert read(elastic) == pytest.approx(read(on_ranks(runs, "whole", zero)), rel=1e-5)
    assert [world for _, world in sorted(read(elastic, "world").items())] == [2, 2, 1, 1, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_curves_of_fifty_steps_agree(place, stage):
    whole = [on_ranks(place, "long", z, stage=stage, steps=50, checkpoint_every=25) for z in ZERO]
    plain = config(place, name="longplain", stage=stage, steps=50, checkpoint_every=25)
    train(plain)
    run_ranks([(c, None) for c in whole])
    for settings in whole:
        assert read(settings) == pytest.approx(read(plain), rel=2e-3)


@pytest.mark.parametrize("zero", ZERO[1:])
@pytest.mark.parametrize("name", ["half", "offloaded", "both"])
def test_bfloat16_and_offload_train_and_go_on_bit_by_bit(runs, name, zero):
    settings = on_ranks(runs, name, zero, **HARD[name])
    close = 1e-5 if name == "offloaded" else 2e-2
    assert read(settings) == pytest.approx(read(on_ranks(runs, "whole", zero)), rel=close)
    assert (read(settings) == read(on_ranks(runs, "whole", zero))) == (name == "offloaded")
    assert read(again(settings)) == read(settings)


@pytest.mark.parametrize("zero", ZERO)
def test_steps_that_spike_are_left_out_alike_by_all(runs, zero):
    settings = on_ranks(runs, "spiky", zero, **HARD["spiky"])
    plain = config(runs, name="spiky", **HARD["spiky"])
    train(plain)
    assert 0 < read(plain, "left_out")[24] < 8
    assert read(settings, "left_out") == read(plain, "left_out")
    assert read(settings) == pytest.approx(read(plain), rel=1e-4)
    assert read(again(settings)) == read(settings)


def seeds(count):
    """One seed of each ZeRO stage in every run of the tests, the others in the soak."""
    return [pytest.param(z, s, marks=[pytest.mark.slow] if s else []) for z in ZERO[1:] for s in range(count)]


@pytest.mark.parametrize(("zero", "seed"), seeds(10))
@pytest.mark.parametrize("stage", [STAGES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in STAGES[1:])])
def test_kills_at_random_moments_change_nothing(place, stage, zero, seed):
    work, whole = (on_ranks(place, name, zero, stage=stage, steps=11, seed=seed) for name in ("work", "whole"))
    starts = killed(work, f"{stage} {zero} {seed}")
    run_ranks([(whole, None)])
    assert read(work) == read(whole)
    assert len(starts) == 3 and starts == sorted(starts)


def test_weight_decay_is_for_matrices_only(ground):
    model = build(plan_job(config(ground)))
    decayed, plain = parameter_groups(model, config(ground).optimizer)
    assert decayed["weight_decay"] > 0 == plain["weight_decay"]
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in plain["params"])
    assert len(make_optimizer(model, config(ground).optimizer).param_groups) == 2


def test_a_checkpoint_of_workers_is_not_taken_up_in_one_process(runs):
    settings = on_ranks(runs, "whole", 1)
    job = plan_job(settings)
    folder, manifest = Checkpoints(job.folder, settings.keep).choose()[0]
    with pytest.raises(UserError, match="was written by 2 workers: continue it with --workers above 0"):
        PlainEngine(build(job), settings).load(folder, manifest)
