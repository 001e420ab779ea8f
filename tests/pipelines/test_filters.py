import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.config import UserError
from pipelines.config import FilterConfig, RulesConfig
from pipelines.filters import Metadata, Rules, judge, measure
from pipelines.video import brightness, split_planes
from tests.pipelines.footage import scroll


@pytest.fixture(scope="module")
def rules():
    return Rules(RulesConfig())


@pytest.mark.parametrize(
    ("title", "reason"),
    [
        ("Super Foo 2D Platformer speedrun", ""),
        ("SUPER FOO \uff12\uff24 PLATFORMER Any% Speedrun", ""),  # full-width letters
        ("Best plataformas gameplay completo", ""),
        ("\u30a2\u30af\u30b7\u30e7\u30f3\u30b2\u30fc\u30e0\u5b9f\u6cc1", ""),  # no spaces between the words
        ("Let\u2019s Play a metroidvania", ""),
        ("Jogo de plataforma, jogo completo", ""),
        ("\ud50c\ub7ab\ud3ec\uba38 \uc2a4\ud53c\ub4dc\ub7f0", ""),
        ("Superheld, ein Plattformer, durchgespielt", ""),
        ("платформер обзор прохождение", "negating_word"),
        ("Racing game speedrun", "title"),
        ("platformers", "no_action_word"),
        ("Platformerish speedrun", "title"),
        ("2D platformer movie speedrun", "negating_word"),
        ("2D platformer filmed speedrun", ""),
    ],
)
def test_titles(rules, title, reason):
    verdict = rules.decide(Metadata(title=title, duration_s=60))
    assert (verdict.reason if verdict else "") == reason


def test_action_words_may_stand_in_the_description_but_platformers_must_be_in_the_title(rules):
    assert rules.decide(Metadata(title="2D platformer", description="a full playthrough")) is None
    assert rules.decide(Metadata(title="a speedrun", description="2D platformer")).reason == "title"


@pytest.mark.parametrize(
    ("metadata", "config", "reason"),
    [
        (Metadata(problem="there is none"), RulesConfig(), "no_sidecar"),
        (Metadata(problem="there is none"), RulesConfig(require_sidecar=False), ""),
        (Metadata(title="platformer speedrun", duration_s=3), RulesConfig(), "too_short"),
        (Metadata(title="platformer speedrun", duration_s=1e6), RulesConfig(), "too_long"),
        (Metadata(title="platformer speedrun", side_px=96), RulesConfig(), "too_small"),
        (Metadata(title="platformer speedrun", side_px=96), RulesConfig(min_side_px=90), ""),
        (Metadata(title="platformer speedrun", side_px=1080), RulesConfig(max_side_px=720), "too_large"),
        (
            Metadata(title="platformer speedrun", uploader="x"),
            RulesConfig(blocked_uploaders=("x",)),
            "blocked_uploader",
        ),
    ],
)
def test_bounds(metadata, config, reason):
    verdict = Rules(config).decide(metadata)
    assert (verdict.reason if verdict else "") == reason


def test_explain_lists_every_rule(rules):
    steps = rules.explain(Metadata(title="platformer movie speedrun", duration_s=60))
    assert [name for name, _ in steps][:2] == ["sidecar", "uploader"]
    assert [name for name, verdict in steps if verdict] == ["negating"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title = [", "is no TOML"),
        ("title = ['a']", "give lists of words"),
        ("title=[1]\naction=[]\nnegating=[]", "give lists"),
        (None, "no rule file"),
    ],
)
def test_a_bad_rule_file_is_one_sentence(tmp_path, text, said):
    path = tmp_path / "rules.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said):
        Rules(RulesConfig(file=path))


def test_own_rules(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("title = ['racing']\naction = ['lap (best)']\nnegating = []\n")
    rules = Rules(RulesConfig(file=path))
    assert rules.decide(Metadata(title="Racing: lap (best)")) is None
    assert rules.decide(Metadata(title="platformer speedrun")).reason == "title"


def grey(frames):
    return brightness(np.stack([split_planes(f) for f in frames]))


def signals(frames, **facts):
    return {
        **measure(grey(frames)),
        "held_share": 0.0,
        "max_gap_ms": 100,
        "corrupt_share": 0.0,
        "cut_frames": [],
        **facts,
    }


def noisy(picture, frames=40):
    rng = np.random.default_rng(0)
    return np.clip(picture[None] + rng.normal(0, 2, (frames, *picture.shape)), 0, 255).astype(np.uint8)


def blurred(frames):
    import cv2

    return np.stack([cv2.GaussianBlur(f, (0, 0), 6) for f in frames])


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (scroll(40), ""),
        (scroll(40) // 8, ""),  # a dark game is no black screen
        (noisy(scroll(1)[0]), "static"),
        (noisy(np.zeros((64, 64, 3))), "black"),
        (noisy(np.full((64, 64, 3), 250.0)), "black"),
        (np.repeat(np.stack([scroll(1, seed=s)[0] for s in range(4)]), 10, axis=0), "static"),  # a slideshow
        (blurred(scroll(40, speed=4)), "blur"),
    ],
)
def test_what_is_seen_decides(frames, reason):
    assert judge(signals(frames), FilterConfig()) == reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"corrupt_share": 0.03}, "corrupt"),
        ({"held_share": 0.7}, "too_few_frames"),
        ({"max_gap_ms": 2500}, "gap"),
        ({"cut_frames": list(range(13))}, "cuts"),
        ({"cut_frames": list(range(12))}, ""),
        ({"static_share": 0.9, "cut_frames": [3]}, "static"),
        ({"static_share": 0.9, "cut_frames": [3, 9]}, "slideshow"),
        ({"shape": 0.7}, "portrait"),
        ({"shape": 1.0}, ""),
        ({"shape": None}, ""),  # a row from before it was measured
    ],
)
def test_what_the_decoder_met_decides(facts, reason):
    assert judge(signals(scroll(40), **facts), FilterConfig()) == reason


@given(top=st.integers(0, 20), left=st.integers(0, 20))
def test_bars_are_measured(top, left):
    frames = scroll(3) // 2 + 100
    frames[:, :top], frames[:, :, :left] = 0, 0
    assert measure(grey(frames))["letterbox"] == pytest.approx(1 - (64 - top) * (64 - left) / 64**2)
