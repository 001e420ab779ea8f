"""Training against a real MLflow server: one run after a kill, an outage, what a stranger finds there, its pages."""

import json
import logging
import pickletools
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from playwright.sync_api import expect, sync_playwright

from infra.config import Home, TrackingConfig
from infra.registry import Registry
from infra.tracking import NOTE_TAG
from models.world import World
from pipelines.jobs import plan_job
from pipelines.train import train
from tests.pipelines.conftest import copy_of
from tests.pipelines.mlflow_server import Server
from tests.pipelines.ranks import config

STEPS = 40
ROOT = Path(__file__).parents[2]
CHROMIUM = "/usr/bin/chromium"
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_store):
    made = Server(tmp_path_factory.mktemp("mlflow"), empty_store)
    made.start()
    yield made
    made.kill()


def settings(home, server, **changes):
    return config(home, **{"stage": "world", "name": "told", "steps": STEPS, "picture_every": 20,
                           "tracking": TrackingConfig(uri=server.url, experiment="shown"), **changes})  # fmt: skip


def runs(server, name):
    client = MlflowClient(server.url, server.url)
    found = client.search_runs([client.get_experiment_by_name("shown").experiment_id])
    return client, [run for run in found if run.info.run_name == name]


DRIVER = """
import sys
from types import SimpleNamespace
from infra.config import Home
from pipelines.train import train
from tests.pipelines.test_mlflow import settings
train(settings(Home(sys.argv[1]), SimpleNamespace(url=sys.argv[2])))
"""


def steps_of(job):
    path = job.folder / "progress.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line["step"] for line in map(json.loads, lines[:-1]) if "step" in line]


def when(job, step, act):
    def wait():
        while max(steps_of(job), default=0) < step:
            time.sleep(0.01)
        act()

    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(scope="module")
def trained(server, ground, tmp_path_factory):
    """A world whose first driver died by SIGKILL halfway."""
    home = copy_of(ground, tmp_path_factory.mktemp("told") / "home")
    job = plan_job(settings(home, server))
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(home.path), server.url], cwd=ROOT)
    when(job, STEPS // 2, driver.kill)
    assert driver.wait(300) == -signal.SIGKILL
    return train(settings(home, server))


def test_one_run_with_parameters_curves_pictures_and_lineage(server, trained):
    client, (run,) = runs(server, "told")
    assert run.info.status == "FINISHED"
    assert run.data.params["model.dynamics.vocabulary"] == "32"
    assert run.data.params["optimizer.schedule"] == "cosine"
    assert run.data.tags["parent.dataset"] == "toys@0" and run.data.tags["parent.tokenizer"] == "tokenizer@v1"
    assert run.data.tags["artifact"] == trained.reference
    assert re.search(r"continued at step \d+ with 1 workers", run.data.tags[NOTE_TAG])
    for name in ("loss", "dynamics/loss", "grad_norm", "lr", "samples_per_s", "tokens_per_s", "mfu", "memory_bytes",
                 "data_wait_s", "actions/perplexity", "actions/codes_used"):  # fmt: skip
        points = client.get_metric_history(run.info.run_id, name)
        assert [m.step for m in points][-1] == STEPS, name
        assert len({m.step for m in points}) == len(points), name
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, STEPS + 1))
    assert [m.step for m in client.get_metric_history(run.info.run_id, "held_out/dpsnr_db")] == [0, 20, 40]
    shown = {f.path for f in client.list_artifacts(run.info.run_id, "pictures")}
    assert shown == {f"pictures/actions-{step:07d}.png" for step in (0, 20, 40)}
    assert [f.path for f in client.list_artifacts(run.info.run_id, "figures")] == ["figures/loss.svg"]


def test_the_registered_model_is_files_without_pickle_that_another_machine_loads(server, trained, tmp_path):
    elsewhere = Home(tmp_path / "elsewhere").ensure()
    registry = Registry(TrackingConfig(uri=server.url, experiment="shown"), elsewhere)
    fetched = registry.fetch(registry.aliases("told")["champion"])
    assert fetched.fingerprint == trained.fingerprint
    assert World.load(fetched.path).action_count == 4
    files = [path for path in fetched.path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".png"}
    for path in files:
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))


def test_an_outage_in_the_middle_does_not_stop_training_and_all_arrives_later(server, ground, tmp_path, caplog):
    away = settings(copy_of(ground, tmp_path / "home"), server, name="away", seed=1)
    job = plan_job(away)
    when(job, 10, server.kill)
    with caplog.at_level(logging.WARNING):
        made = train(away)
    assert server.process is None
    assert "does not take records" in caplog.text and "the next run of this work sends them" in caplog.text
    server.start()
    assert train(away).reference == made.reference
    client, (run,) = runs(server, "away")
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == list(range(1, STEPS + 1))
    assert len(client.list_artifacts(run.info.run_id, "pictures")) == 3
    registry = Registry(away.tracking, Home(tmp_path / "elsewhere").ensure())
    assert registry.fetch("away@v1").fingerprint == made.fingerprint
    sent = (job.folder / "tracking.json").read_text()
    assert train(away).reference == made.reference
    assert (job.folder / "tracking.json").read_text() == sent


def test_its_own_pages_show_the_run(server, trained):
    """In a real browser; the picture in docs/training.md is what this leaves in test-results/."""
    _, (run,) = runs(server, "told")
    page_of = f"{server.url}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    (ROOT / "test-results").mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60000)
        expect.set_options(timeout=60000)
        page.goto(page_of)
        expect(page.get_by_text("held_out/dpsnr_db").first).to_be_visible()
        expect(page.get_by_text(f"published {trained.reference}").first).to_be_visible()
        page.screenshot(path=ROOT / "test-results" / "mlflow-run.png")
        page.goto(f"{page_of}/artifacts/pictures/actions-0000040.png")
        expect(
            page.locator("img[src*='actions'], img[src^='blob:'], .image-outer-container img, canvas").first
        ).to_be_visible()
        page.screenshot(path=ROOT / "test-results" / "mlflow-pictures.png")
        page.goto(f"{page_of}/model-metrics")
        expect(page.locator(".js-plotly-plot").first).to_be_visible()
        page.screenshot(path=ROOT / "test-results" / "mlflow-curves.png")
        browser.close()
