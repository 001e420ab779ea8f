"""The scaling study for real: Ray Tune, real trainings, killed and continued, one parent run in MLflow."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from mlflow import MlflowClient

from infra.artifact import versions
from infra.config import UserError
from pipelines.sweep import command, sweep
from pipelines.sweep_config import SweepConfig
from tests.pipelines.ranks import OPTIMIZER, config

CONSTANT = replace(OPTIMIZER, schedule="constant", final_lr=0.0)
SIZES = ("16x1", "32x2")


def study(home, steps=16, **changes):
    base = config(home, steps=steps, optimizer=CONSTANT, batch=8, checkpoint_every=4)
    return SweepConfig(**{"train": base, "sizes": SIZES, "batches": (4, 8), "budget_flops": 1e12, **changes})


SWEEP = """
import sys
from infra.config import Home
from pipelines.sweep import sweep
from tests.pipelines.test_sweep import study
sweep(study(Home(sys.argv[1])))
"""


def trials(home):
    """(name, artifact) of what the sweep has trained."""
    return {made.name: made for made in versions(home) if made.name.startswith("tokenizer-") and made.kind != "study"}


@pytest.fixture(scope="module")
def killed_and_continued(ground, tmp_path_factory):
    """A sweep whose driver dies by SIGKILL after its first trial, and the same command again."""
    from tests.pipelines.conftest import copy_of

    home = copy_of(ground, tmp_path_factory.mktemp("sweep") / "home")
    driver = subprocess.Popen([sys.executable, "-c", SWEEP, str(home.path)], start_new_session=True)
    until = time.monotonic() + 300
    while not trials(home) and driver.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(60)
    early = trials(home)
    assert early and driver.returncode == -signal.SIGKILL
    return home, early, sweep(study(home))


def test_what_was_trained_before_the_kill_is_kept(killed_and_continued):
    home, early, made = killed_and_continued
    assert {f"tokenizer-{size}-b{batch}" for size in SIZES for batch in (4, 8)} == set(trials(home))
    assert {name: trials(home)[name].created for name in early} == {name: a.created for name, a in early.items()}
    assert all(a.version == "v1" for a in trials(home).values())
    assert made.parents["b8-32x2"] == "tokenizer-32x2-b8@v1"


def test_the_study_has_its_curves_a_law_for_each_batch_and_a_choice(killed_and_continued):
    home, _, made = killed_and_continued
    found = json.loads((made.path / "study.json").read_text())
    assert [curve["steps"] for curve in found["curves"]] == [list(range(1, 17))] * 4
    assert set(found["laws"]) == {"4", "8"}
    choice = found["choice"]
    assert choice["loss"] == min(c["loss"] for c in found["choices"])
    assert choice["steps"] * choice["batch"] * 4 * 16 == pytest.approx(choice["tokens"])
    page = (made.path / "index.html").read_text()
    assert "too few or too short" in page  # two sizes
    assert page.count("<svg") == 2 and "1e+12 operations are best spent on" in page
    assert sweep(study(home)).reference == made.reference == "tokenizer-sweep@v1"


def test_mlflow_shows_the_trials_below_one_parent(killed_and_continued):
    home, _, _ = killed_and_continued
    client = MlflowClient(home.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("lampworks").experiment_id])
    (parent,) = (r for r in runs if r.info.run_name == "tokenizer-sweep")
    below = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(r.info.run_name for r in below) == sorted(f"tokenizer-{s}-b{b}" for s in SIZES for b in (4, 8))
    assert all(r.info.status == "FINISHED" for r in [parent, *below])
    assert parent.data.metrics["parameters"] > 0
    files = {f.path for f in client.list_artifacts(parent.info.run_id, "study")}
    assert {"study/index.html", "study/study.json", "study/scaling-b4.svg"} <= files


def test_a_dry_run_needs_no_dataset(tmp_path):
    from infra.config import Home

    base = study(Home(tmp_path))
    said = command(replace(base, train=replace(base.train, dry_run=True)))
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "16x1 batch 4", "32x2 batch 4", "16x1 batch 8", "32x2 batch 8", "all"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": ("64x4", "64x4")}, "--sizes names 1: a law needs at least two"),
        ({"sizes": ("64x4", "big")}, "'big': write width x layers, such as 64x4"),
        ({"sizes": ("64x4", "60x4")}, "4 heads need a width that is a multiple of 8"),
        ({"batches": ()}, "--batches is empty"),
    ],
)
def test_wrong_settings_are_one_sentence(ground, changes, said):
    with pytest.raises(UserError, match=said):
        study(ground, **changes)


def test_a_falling_rate_and_a_stage_without_sizes_are_refused(ground):
    with pytest.raises(UserError, match="set --train.optimizer.schedule constant"):
        SweepConfig(train=config(ground))
    with pytest.raises(UserError, match="a sweep takes one of tokenizer, actions, dynamics, world"):
        SweepConfig(train=config(ground, optimizer=CONSTANT, stage="quality"))


def test_a_dataset_that_is_gone_is_one_sentence(place):
    with pytest.raises(UserError, match="no dataset|gone"):
        sweep(study(place, train=config(place, optimizer=CONSTANT, dataset="gone")))
