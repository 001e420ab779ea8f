import cv2
import numpy as np
import pytest

from infra.config import UserError
from pipelines.config import FilterConfig
from pipelines.replay import replay
from pipelines.review_config import ReplayConfig
from tests.pipelines.footage import corpus, settings


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("raw"), good=1)


def again(tmp_path, raw, video, **changes):
    same = settings(tmp_path / "home", raw, filters=FilterConfig())
    return replay(ReplayConfig(**{**vars(same), **changes}, video=video))


def test_every_decision_is_shown_with_its_numbers_and_a_picture(tmp_path, raw):
    said = again(tmp_path, raw, "half").splitlines()
    assert said[0] == "half.mp4 (half)"
    assert "  rule title         passed" in said
    assert any(line.startswith("  decode h264 64x64 px at 20 fps, 4.5 s in ") for line in said)
    assert any(line.startswith("  clips  partial | stage filter | static") for line in said)
    kept, static = (line for line in said if " s kept " in line or " s static " in line)
    assert "static 0 (0.8)" in kept
    assert "static 1! (0.8)" in static
    assert said[-1] == "not curated yet"
    picture = cv2.imread(str(next((tmp_path / "home" / "reports").glob("replay-half.png"))))
    assert picture.shape[0] == 2 * 50
    first, second = (picture[top : top + 48, 150:534].reshape(48, 8, 48, 3) for top in (0, 50))
    assert np.abs(np.diff(first.astype(int), axis=1)).mean() > 10 > np.abs(np.diff(second.astype(int), axis=1)).mean()
    assert not (tmp_path / "home" / "datasets").exists()


def test_a_stage_is_where_it_ends(tmp_path, raw):
    rules = again(tmp_path, raw, "wrong", stage="rules")
    assert "rule negating      REFUSED negating_word: movie" in rules
    assert "decode" not in rules
    decode = again(tmp_path, raw, "good0.mp4", stage="decode")
    assert "decode h264" in decode
    assert " s kept " not in decode


def test_what_cannot_be_decoded_says_why(tmp_path, raw):
    assert "decode dead_letter | stage decode | unreadable | " in again(tmp_path, raw, "text")
    with pytest.raises(UserError, match="no video 'nobody'"):
        again(tmp_path, raw, "nobody")
    with pytest.raises(UserError, match="lampworks replay VIDEO"):
        again(tmp_path, raw, "")
