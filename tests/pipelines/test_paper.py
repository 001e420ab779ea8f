"""The presets' computed sizes against the paper's tables."""

import pytest

from models.config import WorldConfig
from pipelines.paper import NAMES, WORLDS, describe


def rows(name: str) -> dict[str, tuple[float, float | None]]:
    return {row.item: (row.computed, row.paper) for row in describe(name)}


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("genie")])
def test_dynamics_have_the_papers_parameters_within_seven_percent(name):
    found, published = rows(name)["dynamics: parameters"]
    if published is not None:
        assert found == pytest.approx(published, rel=0.07)


def test_tokenizer_and_action_model_by_the_reading():
    assert rows("tokenizer-200m")["tokenizer: parameters"][0] == pytest.approx(192.9e6, rel=0.01)
    assert rows("lam-300m")["latent action model: parameters"][0] == pytest.approx(335.5e6, rel=0.01)


@pytest.mark.parametrize(("name", "reading"), [("genie-11b", 10.108e9), ("genie-2.3b", 2.319e9)])
def test_totals_meet_the_papers(name, reading):
    found, published = rows(name)["all: parameters"]
    assert found == pytest.approx(reading, rel=0.005)
    assert found == pytest.approx(published, rel=0.01)


def test_the_final_run_sees_920_tokens_per_frame_and_942_billion_in_all():
    found = rows("genie-11b")
    assert found["tokens per frame"] == (920, 920)
    assert found["dynamics: training tokens"][0] == pytest.approx(942e9, rel=0.001)
    assert found["dynamics: training operations"][0] == pytest.approx(6.6e22, rel=0.2)


def test_robotics_has_the_published_size():
    found, published = rows("robotics-2.5b")["all: parameters"]
    assert found == pytest.approx(published, rel=0.07)


def test_coinrun_is_the_papers_case_study():
    world = WORLDS["coinrun"]()
    assert (world.tokenizer.height_px, world.frames, world.actions.codebook.size) == (64, 16, 6)
    assert rows("coinrun")["tokens per frame"][0] == 256


@pytest.mark.parametrize("name", list(WORLDS))
def test_every_world_fits_together(name):
    assert isinstance(WORLDS[name](), WorldConfig)
