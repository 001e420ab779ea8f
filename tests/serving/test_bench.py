import pytest

from infra.config import UserError
from serving.bench import bench
from serving.config import BenchConfig


def test_players_are_counted_and_timed(local, capsys):
    result = bench(BenchConfig(url=local, sessions=3, steps=8, rate_fps=0))
    printed = capsys.readouterr().out
    assert "3 x 8 steps, as fast as it goes" in printed
    assert 0 < result.p50_s <= result.p95_s <= result.longest_s
    assert 0 < result.model_s < result.longest_s
    assert (result.on_pace, result.reconnects) == (3, 0)
    paced = bench(BenchConfig(url=local, sessions=2, steps=10, rate_fps=20))
    assert paced.frames_per_s <= 2 * 20 * 10 / 9 + 1, "players wait for their next frame's time"


def test_no_server_is_one_clear_sentence():
    with pytest.raises(UserError, match="lampworks serve"):
        bench(BenchConfig(url="http://127.0.0.1:9", sessions=1))


@pytest.mark.parametrize(
    ("given", "says"), [({"sessions": 0}, "--sessions is 0"), ({"rate_fps": -1}, "--rate-fps is -1")]
)
def test_a_wrong_setting_says_so(given, says):
    with pytest.raises(UserError, match=says):
        BenchConfig(**given)
