import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient

from infra.artifact import ArtifactError, find, lineage
from infra.config import UserError
from infra.tracking import NOTE_TAG
from models.checkpoint import load_model
from models.config import SamplerConfig
from models.world import World
from pipelines.feed import local_batches
from pipelines.jobs import plan_job
from pipelines.loop import Diverged, Loop, learning_rate
from pipelines.spikes import FEWEST, SPAN, Watch, read_skipped, write_skipped
from pipelines.stages import build, estimate
from pipelines.train import Interrupted, starting_step, train
from pipelines.train_config import KeepConfig, OptimizerConfig, TrainConfig
from pipelines.zero import PlainEngine
from tests.pipelines.clips import write_dataset
from tests.pipelines.ranks import STAGES, config, losses


class Killed(RuntimeError):
    """Stands for SIGKILL where a process is needed afterwards."""


def die_at(settings, step, engine=PlainEngine):
    """Trains here, and dies in the middle of a step, with whatever lies in the folder by then."""
    job = plan_job(settings)
    job.folder.mkdir(parents=True, exist_ok=True)
    began = starting_step(job)

    def batches():
        for n, batch in enumerate(local_batches(job.source, job.schedule(), began)):
            if began + n / job.schedule().per_step > step:
                raise Killed
            yield batch

    with pytest.raises(Killed):
        Loop(job, engine(build(job), settings), batches()).run()
    return job


@pytest.mark.parametrize("stage", STAGES)
def test_continued_equals_uninterrupted_bit_by_bit(place, stage):
    whole, broken = (config(place, stage=stage, name=name, steps=7) for name in ("whole", "broken"))
    one = train(whole)
    for step in (3, 6):
        die_at(broken, step)
    other = train(broken)
    assert losses(plan_job(broken).folder) == losses(plan_job(whole).folder)
    assert one.files.keys() == other.files.keys()
    assert {f: d for f, d in one.files.items() if f.endswith(".safetensors")} == {
        f: d for f, d in other.files.items() if f.endswith(".safetensors")
    }


def test_the_second_time_there_is_nothing_to_do(place):
    settings = config(place, name="once")
    first = train(settings)
    assert (
        train(replace(settings, log_every=3, checkpoint_every=5, workers=2)).reference == first.reference == "once@v1"
    )
    assert train(replace(settings, seed=1)).reference == "once@v2"
    assert find(place, name="once", identity=first.identity).version == "v1"


def test_a_world_can_be_played_and_walked_back(place):
    made = train(config(place, stage="world", picture_every=3))
    assert made.kind == "world"
    assert made.parents == {"dataset": "toys@0", "tokenizer": "tokenizer@v1"}
    assert [a.reference for a in lineage(place, made.reference)] == ["world@v1", "tokenizer@v1"]
    assert len(list((made.path / "prompts").glob("*.png"))) == 8
    world = World.load(made.path)
    state = world.start(np.zeros((1, *world.frame_shape), np.uint8), 3, SamplerConfig(steps=2))
    _, frame = world.step(state, world.action_count - 1)
    assert tuple(frame.shape) == world.frame_shape


def test_dynamics_alone_make_a_world_with_their_finished_actions(place):
    made = train(config(place, stage="dynamics"))
    assert made.parents == {"dataset": "toys@0", "tokenizer": "tokenizer@v1", "actions": "actions@v1"}
    held, alone = World.load(made.path).actions, load_model(place.artifacts / "actions" / "v1")
    assert all(torch.equal(a, b) for a, b in zip(held.state_dict().values(), alone.state_dict().values(), strict=True))


def test_a_distilled_world_stands_on_its_teacher_and_continues_bit_by_bit(place):
    teacher = train(config(place, stage="world"))
    few = {"stage": "distilled", "teacher": "world", "few_steps": 2, "teacher_steps": 4, "steps": 5}
    whole, broken = (config(place, name=name, **few) for name in ("whole", "broken"))
    one = train(whole)
    die_at(broken, 3)
    other = train(broken)
    assert one.parents == {"dataset": "toys@0", "teacher": teacher.reference}
    weights, again, taught = (
        {f: d for f, d in made.files.items() if f.endswith(".safetensors")} for made in (one, other, teacher)
    )
    assert weights == again
    assert {f for f in weights if weights[f] != taught[f]} == {"dynamics/model.safetensors"}
    assert train(replace(whole, few_steps=3)).reference == "whole@v2"
    third = train(replace(whole, name="third", teacher="whole", few_steps=2, teacher_steps=3))
    assert third.parents["teacher"] == "whole@v2"  # whose tokenizer is that of its own teacher


def test_one_run_in_mlflow_survives_a_restart_with_all_that_it_says(place):
    settings = config(place, name="told", stage="world", picture_every=3, steps=6)
    die_at(settings, 5)
    made = train(settings)
    client = MlflowClient(place.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("lampworks").experiment_id])
    run = next(r for r in runs if r.info.run_name == "told")
    assert [r.info.run_name for r in runs].count("told") == 1
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]
    assert run.data.params["model.dynamics.vocabulary"] == "32"
    assert run.data.tags["parent.tokenizer"] == "tokenizer@v1"
    assert run.data.tags["artifact"] == made.reference
    assert "continued at step 4" in run.data.tags[NOTE_TAG]
    shown = [f.path for f in client.list_artifacts(run.info.run_id, "pictures")]
    assert shown == [f"pictures/actions-{step:07d}.png" for step in (0, 3, 6)]
    assert [f.path for f in client.list_artifacts(run.info.run_id, "figures")] == ["figures/loss.svg"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(place):
    whole, broken = (config(place, name=name, steps=7) for name in ("whole", "broken"))
    train(whole)
    job = die_at(broken, 5)
    newest = job.folder / "checkpoints" / "step-000000004"
    with (newest / "plain.pt").open("r+b") as file:
        file.seek(2000)
        file.write(b"damage")
    train(broken)
    assert losses(job.folder) == losses(plan_job(whole).folder)
    said = (job.folder / "progress.jsonl").read_text()
    assert "step-000000004 is damaged (plain.pt differs from what was written): falling back" in said
    assert "continued at step 2" in said


def test_a_stop_ends_with_a_checkpoint_and_the_same_command_continues(place):
    settings = config(place, name="stopped", checkpoint_every=100)
    job = plan_job(settings)
    job.folder.mkdir(parents=True)
    (job.folder / "checkpoints").mkdir()
    (job.folder / "stop").touch()
    outcome = Loop(job, PlainEngine(build(job), settings), local_batches(job.source, job.schedule(), 0)).run()
    assert (outcome.step, outcome.finished) == (1, False)
    train(settings)
    assert sorted(losses(job.folder)) == [1, 2, 3, 4, 5, 6]
    assert issubclass(Interrupted, UserError)


class Poisoned(PlainEngine):
    """Gradients turn to NaN, or grow, on the batches that hold some samples, as a bad clip would do."""

    bad, factor = (), math.nan

    def step(self, lr, limit=math.inf):
        if self.first in self.bad:
            for parameter in self.model.parameters():
                parameter.grad.mul_(self.factor)
        return super().step(lr, limit)


def poisoned_run(settings, bad, factor=math.nan):
    job = plan_job(settings)
    job.folder.mkdir(parents=True, exist_ok=True)
    step, skipped = starting_step(job), tuple(read_skipped(job.folder))
    engine = Poisoned(build(job), settings)
    engine.bad, engine.factor = bad, factor

    def batches():
        for n, batch in enumerate(local_batches(job.source, job.schedule(skipped), step)):
            engine.first = engine.first if n % 2 else int(batch["sample"][0])
            yield batch

    return job, engine, Loop(job, engine, batches())


def test_a_step_that_is_not_finite_is_left_out_and_named(place):
    job, engine, loop = poisoned_run(config(place, name="poisoned"), bad=(16,))
    loop.run()
    assert all(bool(p.isfinite().all()) for p in engine.model.state_dict().values())
    said = (job.folder / "progress.jsonl").read_text()
    assert "step 2 was not finite and is left out (samples 16..23)" in said
    assert losses(job.folder, "left_out")[6] == 1


@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_past_the_budget_it_rolls_back_to_before_the_first_and_goes_around_them(place, factor):
    """As if the bad batches had never been in the order of samples, bit by bit."""
    first, last = (2, 8) if math.isnan(factor) else (17, 23)
    changes = {
        "steps": last + 4,
        "skip_budget": 1,
        "spike_factor": 0 if math.isnan(factor) else 20,
        "keep": KeepConfig(),
    }
    settings = config(place, name="rolled", **changes)
    bad = (first * 8, last * 8)
    job, _, loop = poisoned_run(settings, bad, factor)
    with pytest.raises(Diverged, match="2 steps were left out, the budget is 1"):
        loop.run()
    assert json.loads((job.folder / "skipped.json").read_text()) == [first, last]
    said = (job.folder / "progress.jsonl").read_text()
    assert f"rolling back before step {first}, around 2 batches: [{first}, {last}]" in said
    assert f'"rolled_back": {first}' in said
    assert ("gradient norm" in said) == (factor == 1e4)
    job, _, loop = poisoned_run(settings, bad, factor)
    assert loop.checkpoints.chosen()[1]["step"] == first - first % 2
    loop.run()
    assert losses(job.folder, "left_out")[last + 4] == 0
    clean = plan_job(replace(settings, name="clean"))
    clean.folder.mkdir(parents=True)
    write_skipped(clean.folder, [first, last])
    train(replace(settings, name="clean"))
    assert losses(job.folder) == losses(clean.folder)


def test_what_was_left_out_is_remembered_by_a_restart(place):
    settings = config(place, name="again", steps=10, skip_budget=1)
    _, _, loop = poisoned_run(settings, bad=(16,))
    feed = loop.batches
    loop.batches = (batch for n, batch in enumerate(feed) if n < 12)
    with pytest.raises(StopIteration):
        loop.run()
    _, _, loop = poisoned_run(settings, bad=(64,))
    with pytest.raises(Diverged):
        loop.run()


def test_a_loss_far_above_the_median_is_a_spike_once_enough_are_known():
    watch = Watch(3.0)
    for n in range(FEWEST):
        assert watch.limit("loss") == math.inf
        watch.add(1.0 + n % 2 / 10, 2.0)
    assert (watch.limit("loss"), watch.limit("norm")) == (pytest.approx(3.15), 6.0)
    assert watch.reason(4.0, 1.0) == "spiked (loss 4, the median of the steps before is 1.05)"
    assert watch.reason(1.0, 7.0) == "spiked (gradient norm 7, the median of the steps before is 2)"
    assert watch.reason(1.0, math.inf) == "was not finite"
    for _ in range(200):
        watch.add(5.0, 5.0)
    assert len(watch.seen["loss"]) == SPAN and watch.limit("loss") == 15.0
    assert Watch(0.0).limit("loss") == math.inf


def test_the_average_of_the_weights_is_published_and_survives_a_restart(place):
    smooth = replace(config(place).optimizer, ema_decay=0.5)
    whole, broken, last = (config(place, name=name, optimizer=smooth) for name in ("whole", "broken", "last"))
    one = train(whole)
    die_at(broken, 5)
    assert train(broken).files["model.safetensors"] == one.files["model.safetensors"]
    assert (
        train(replace(last, optimizer=config(place).optimizer)).files["model.safetensors"]
        != one.files["model.safetensors"]
    )


@given(
    st.sampled_from(["constant", "cosine", "wsd"]),
    st.integers(1, 400),
    st.integers(0, 60),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_rates_stay_in_bounds_rise_in_the_warm_up_and_end_low(schedule, steps, warmup, share, low):
    optimizer = OptimizerConfig(lr=1.0, final_lr=low, schedule=schedule, warmup_steps=warmup, decay_share=share)
    rates = [learning_rate(optimizer, step, steps) for step in range(steps)]
    assert all(0 <= rate <= 1 + 1e-9 for rate in rates)
    rising = rates[: min(warmup, steps)]
    if schedule != "wsd":
        assert all(a < b for a, b in pairwise(rising))
    falling = rates[warmup:]
    assert all(a >= b - 1e-9 for a, b in pairwise(falling))
    if schedule == "wsd" and share > 0 and warmup < steps:
        assert rates[-1] == pytest.approx(low, abs=1e-6)


def test_parameters_are_counted_without_building(place):
    job = plan_job(config(place, stage="world"))
    assert estimate(job.config, job.model).parameters == sum(p.numel() for p in build(job).parameters())


def test_what_does_not_fit_is_refused_with_the_fix(place):
    other = replace(config(place).model.tokenizer, height_px=64, width_px=64)
    actions = replace(config(place).model.actions, height_px=64, width_px=64)
    dynamics = replace(config(place).model.dynamics, rows=8, columns=8)
    wide = replace(config(place).model, tokenizer=other, actions=actions, dynamics=dynamics)
    with pytest.raises(UserError, match="toys@0 has clips of 32x32 px, the tokenizer takes 64x64: curate"):
        train(config(place, model=wide))
    with pytest.raises(UserError, match="no dataset 'toy'.*did you mean 'toys'"):
        train(config(place, dataset="toy"))
    with pytest.raises(UserError, match="no version toys@7: the newest is toys@0"):
        train(config(place, dataset="toys@7"))
    with pytest.raises(ArtifactError, match="did you mean tokenizer"):
        train(config(place, stage="world", tokenizer="tokeniser"))
    with pytest.raises(ArtifactError, match="actions@v1 is a actions, a tokenizer is needed"):
        train(config(place, stage="world", tokenizer="actions"))
    with pytest.raises(UserError, match="--batch 10 is not a multiple of --micro-batch 4 x 2 workers.*--batch 16"):
        TrainConfig(batch=10, micro_batch=4, workers=2)
    with pytest.raises(UserError, match="--zero 3 shards them"):
        TrainConfig(zero=3, optimizer=OptimizerConfig(ema_decay=0.9))
    with pytest.raises(UserError, match="--zero 0 with --precision bf16"):
        TrainConfig(zero=0, precision="bf16")


def test_training_on_a_grown_dataset_wants_tokens_of_the_new_clips(place):
    write_dataset(place, unit="u1", clips=2, test=0)
    with pytest.raises(UserError, match="2 clips of toys@1 have no tokens of tokenizer@v1: run `lampworks tokenize"):
        train(config(place, stage="world", dataset="toys@1"))
    assert train(config(place, stage="world", dataset="toys@0")).parents["dataset"] == "toys@0"


def test_a_home_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/home"):
        train(TrainConfig(home=tmp_path / "file" / "home"))
