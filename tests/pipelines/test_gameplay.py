import json

import numpy as np
import pytest

from infra.config import Home, UserError
from pipelines.config import RecordConfig
from pipelines.gameplay import COMBOS, held_actions, plan, play, record
from pipelines.sampling import Sampler
from pipelines.video import VideoError, probe


def config(home, **changes):
    values = {"home": home, "episodes": 2, "side_games": ("jumper",), "min_s": 3.0, "max_s": 4.0, "seed": 7}
    return RecordConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return home, record(config(home))


def by_kind(home):
    return {e.kind: e for e in plan(config(home))}


def shown(path):
    return np.stack([s.frame for s in Sampler(path, fps=10, width_px=64, height_px=64, aspect="pad").slots()])


def test_it_writes_what_a_crawl_holds(recorded):
    home, paths = recorded
    episodes = plan(config(home))
    assert [p.name for p in paths] == sorted(f"{e.video_id}.mp4" for e in episodes)
    kinds = [e.kind for e in episodes]
    assert kinds == ["play"] * 3 + ["static", "wrong", "broken", "truncated", "bare", "copy"]
    raw = Home(home).raw
    for episode in episodes:
        assert (raw / f"{episode.video_id}.info.json").exists() == (episode.kind != "bare")
    info = json.loads((raw / f"{episodes[0].video_id}.info.json").read_text())
    assert {"id", "title", "description", "tags", "duration", "uploader", "webpage_url"} <= set(info)


def test_the_unwanted_are_what_they_claim(recorded):
    home, _ = recorded
    raw, kinds = Home(home).raw, by_kind(home)
    paths = {kind: raw / f"{episode.video_id}.mp4" for kind, episode in kinds.items()}
    first = raw / f"{plan(config(home))[0].video_id}.mp4"
    assert paths["copy"].read_bytes() == first.read_bytes()
    for kind in ("broken", "truncated"):
        with pytest.raises(VideoError, match="unreadable"):
            probe(paths[kind])
    still = shown(paths["static"]).astype(int)
    assert np.abs(still - still[0]).max() <= 16


def test_the_video_shows_the_states_and_the_actions_that_led_to_them(recorded):
    home, _ = recorded
    settings = config(home)
    for episode in [e for e in plan(settings) if e.kind == "play"]:
        states, actions = play(settings, episode)
        path = Home(home).raw / f"{episode.video_id}.mp4"
        frames = shown(path)
        truth = states[::2]
        assert len(frames) == len(truth) == round(episode.duration_s * 10)
        error = ((frames.astype(float) - truth) ** 2).mean()
        late = ((frames[:-1].astype(float) - truth[1:]) ** 2).mean()
        assert error < 150  # 4:2:0 costs up to 20 dB where colours are small and glaring
        assert late > 4 * error
        with np.load(path.with_suffix(".actions.npz")) as data:
            at = np.searchsorted(data["times_s"], np.arange(len(truth)) / 10 + 1e-6, side="right") - 1
            assert (data["action"][at] == actions[::2]).all()
        assert probe(path).width_px == 64 * episode.scale


def test_equal_seeds_give_equal_games_and_others_do_not(tmp_path):
    first, again, other = (plan(config(tmp_path, seed=s))[0] for s in (7, 7, 8))
    a, b, c = (play(config(tmp_path), e) for e in (first, again, other))
    assert (a[0] == b[0]).all()
    assert (a[1] == b[1]).all()
    assert not np.array_equal(a[1][:20], c[1][:20])


def test_finished_files_are_kept_and_missing_ones_made_again(recorded):
    home, paths = recorded
    lost, kept = paths[0], {p: p.stat().st_mtime_ns for p in paths[1:]}
    content = lost.read_bytes()
    lost.unlink()
    assert record(config(home)) == paths
    assert {p: p.stat().st_mtime_ns for p in paths[1:]} == kept
    assert lost.read_bytes() == content


def test_actions_are_held_and_go_right():
    actions = held_actions(np.random.default_rng(0), 5000, 8)
    runs = np.diff(np.flatnonzero(np.diff(actions, prepend=-1, append=-1)))
    assert runs.min() >= 1
    assert 4.5 < runs.mean() < 8  # 1..8, and equal draws in a row merge
    names = [COMBOS[a] for a in actions]
    assert sum("RIGHT" in n for n in names) > 3 * sum("LEFT" in n for n in names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"game": "pong"}, "no game is called 'pong'"),
        ({"steps_per_second": 15}, "multiple of 10"),
        ({"max_s": 1.0}, "--max-s"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        record(config(tmp_path, **change))
