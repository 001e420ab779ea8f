import dataclasses

import pytest

from infra.config import UserError
from pipelines.curate import command, curate
from tests.pipelines.footage import corpus, film, scroll, settings


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("explain")
    return settings(root / "home", corpus(root / "raw", good=2))


def test_a_dry_run_counts_estimates_and_writes_nothing(config):
    said = command(dataclasses.replace(config, dry_run=True))
    assert '"clip_frames": 20' in said
    assert "new videos   11" in said
    assert "refused      3 by metadata: " in said
    for reason in ("no_sidecar 1", "negating_word 1", "same_bytes 1"):
        assert reason in said
    assert "to decode    8 videos, 0.01 hours" in said
    assert "real time on one core, 1 clips kept" in said
    assert "core-hours" in said
    assert not config.home.exists()


def test_explain_shows_which_rule_decided_and_what_was_seen(config, ray_cluster):
    said = command(dataclasses.replace(config, explain="wrong"))
    assert "rule title         passed" in said
    assert "rule negating      REFUSED negating_word: movie" in said
    assert "not curated yet" in said
    curate(config)
    said = command(dataclasses.replace(config, explain="half.mp4"))
    assert "partial | stage filter | static" in said
    assert "    0.0 s kept" in said
    assert "    2.0 s static" in said
    with pytest.raises(UserError, match="no video 'x' among 11"):
        command(dataclasses.replace(config, explain="x"))


def test_a_size_out_of_bounds_is_a_rule_of_its_own(tmp_path):
    for name, sides in (("small", {"width": 80, "height": "60"}), ("unknown", {"width": 80}), ("odd", {"width": "?"})):
        film(tmp_path / "raw", name, scroll(30), **sides)
    config = settings(tmp_path / "home", tmp_path / "raw")
    said = {name: command(dataclasses.replace(config, explain=name)) for name in ("small", "unknown", "odd")}
    assert "rule min_side      REFUSED too_small: 60.0 px" in said["small"]
    assert "REFUSED" not in said["unknown"] + said["odd"]
