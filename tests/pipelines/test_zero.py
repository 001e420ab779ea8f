"""Numerics of DeepSpeed's engines in two plain torch processes: the same loop, batches and checkpoints, without Ray."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from infra.config import UserError
from pipelines import loop
from pipelines.checkpoints import Checkpoints
from pipelines.jobs import plan_job
from pipelines.stages import build
from pipelines.train import train
from pipelines.train_config import KeepConfig, OptimizerConfig
from pipelines.zero import PlainEngine, make_optimizer, parameter_groups
from tests.pipelines.conftest import copy_of
from tests.pipelines.ranks import STAGES, config, killed, losses, run_ranks

ZERO = (0, 1, 2, 3)
HARD = {
    "half": {"precision": "bf16"},
    "offloaded": {"precision": "bf16", "offload": True},
    "spiky": {"spike_factor": 1.5, "steps": 24, "optimizer": OptimizerConfig(lr=0.01, final_lr=0.01, warmup_steps=2)},
}
"""What two workers do besides; `spiky` is given noise twice."""


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
    world = [on_ranks(home, "world", z, stage="world") for z in (1, 3)]
    kinds = [on_ranks(home, name, z, **HARD[name]) for z in ZERO for name in HARD if z or name == "spiky"]
    elastic = [replace(c, keep=KeepConfig(background=False)) for c in elastic]  # what is on its way dies with the run
    run_ranks([(c, None) for c in whole + world] + [(c, 3) for c in broken] + [(c, 2) for c in elastic])
    run_ranks([(c, 4) for c in elastic], world=1)
    run_ranks([(c, None) for c in broken + elastic])
    run_ranks([(c, None) for c in kinds])  # DeepSpeed's ZeRO-3 changes how its whole process rounds bf16: it comes last
    run_ranks([(again(c), c.steps - 3) for c in kinds])
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


@pytest.mark.parametrize("zero", [1, 3])
def test_co_training_on_two_ranks_computes_what_one_process_computes(runs, zero):
    plain = config(runs, name="plain", stage="world")
    train(plain)
    assert read(on_ranks(runs, "world", zero, stage="world")) == pytest.approx(read(plain), rel=1e-5)


def test_the_memory_told_of_is_the_most_that_one_of_the_workers_held(runs, monkeypatch):
    told = read(on_ranks(runs, "whole", 1), "memory_bytes")
    assert 300e6 < told[1] <= told[6] < 3e9
    meter, engine = loop.Meter(), SimpleNamespace(world=2, rank=0, device="cpu")
    meter.add({"loss": torch.tensor(1.0)})
    other = torch.tensor([3.0, 0.5, 0.25, 0.0, 7e9])  # loss, wait, step, and in its place the memory of the other rank
    monkeypatch.setattr(loop, "memory_bytes", lambda device: 5e9)
    monkeypatch.setattr(loop, "mean", lambda row, engine: (row + other) / engine.world)
    values = meter.read(engine)
    assert (values["loss"], values["data_wait_s"]) == (2.0, 0.25)
    assert values["memory_bytes"] == pytest.approx(7e9)


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
        assert read(settings) == pytest.approx(read(plain), rel=1e-5)


@pytest.mark.parametrize("zero", ZERO[1:])
@pytest.mark.parametrize("name", ["half", "offloaded"])
def test_bfloat16_and_offload_train_and_go_on_bit_by_bit(runs, name, zero):
    settings = on_ranks(runs, name, zero, **HARD[name])
    whole = read(on_ranks(runs, "whole", zero))
    assert read(settings) == pytest.approx(whole, rel=2e-2) and read(settings) != whole
    assert read(again(settings)) == read(settings)


@pytest.mark.parametrize("zero", ZERO)
def test_steps_that_spike_are_left_out_alike_by_all(runs, zero):
    settings = on_ranks(runs, "spiky", zero, **HARD["spiky"])
    assert [step for step, count in read(settings, "left_out").items() if count] == list(range(19, 25))
    assert read(settings, "left_out")[24] == 2
    assert read(settings) == pytest.approx(read(on_ranks(runs, "spiky", 0, **HARD["spiky"])), rel=1e-4)
    assert read(again(settings)) == read(settings)
    assert read(again(settings), "left_out") == read(settings, "left_out")


SEEDS = [(stage, zero, seed) for seed in range(10) for zero in ZERO[1:] for stage in STAGES]
"""The first in every run of the tests, the others in the soak."""


@pytest.mark.parametrize(
    ("stage", "zero", "seed"), [SEEDS[0], *(pytest.param(*s, marks=pytest.mark.slow) for s in SEEDS[1:])]
)
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
