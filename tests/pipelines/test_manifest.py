import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.config import UserError
from pipelines.manifest import new_rows, open_plan, scan, split_of
from tests.pipelines.footage import settings, sidecar


def touch(folder, name, content=b"x", **info):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    sidecar(path, **info)
    return path


def plan(tmp_path, **changes):
    return open_plan(tmp_path / "data", str(tmp_path / "raw"), settings(tmp_path, tmp_path / "raw", **changes), "s")


def test_what_counts_as_a_video(tmp_path):
    for name in ("a.mp4", "sub/b.MKV", "\u4e2d\u6587 \u00fc.webm", ".hidden.mp4", "c.mp4.part", "notes.txt"):
        touch(tmp_path, name)
    (tmp_path / "folder.mp4").mkdir()
    assert [s.uri for s in scan(str(tmp_path))] == ["a.mp4", "sub/b.MKV", "\u4e2d\u6587 \u00fc.webm"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no a.info.json"),
        ("{", "can't be read"),
        ("[1]", "has no title"),
        ('{"title": 5}', "has no title"),
        (b"\xff\xfe", "can't be read"),
    ],
)
def test_a_bad_sidecar_is_a_recorded_reason(tmp_path, content, problem):
    path = touch(tmp_path / "raw", "a.mp4").with_name("a.info.json")
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (row,) = plan(tmp_path).rows
    assert (row["outcome"], row["reason"]) == ("rejected", "no_sidecar")
    assert problem in row["detail"]


@pytest.mark.parametrize("duration", [None, "long", -3, True, 1e30])
def test_a_strange_duration_is_unknown(tmp_path, duration):
    touch(tmp_path / "raw", "a.mp4", duration=duration)
    (row,) = plan(tmp_path).rows
    assert row["duration_s"] is None
    assert not row["verdict"]


def test_only_files_of_equal_size_are_compared_and_the_wanted_one_is_the_original(tmp_path):
    raw = tmp_path / "raw"
    touch(raw, "a.mp4", b"same", title="a movie")  # refused by the rules, so it is no original
    touch(raw, "b.mp4", b"same")
    touch(raw, "c.mp4", b"same")
    touch(raw, "d.mp4", b"else")
    rows = {r["video_id"]: r for r in plan(tmp_path).rows}
    assert {k: (r["outcome"], r["detail"]) for k, r in rows.items() if k != "a"} == {
        "b": (None, None), "c": ("duplicate", "as b"), "d": (None, None)
    }  # fmt: skip
    assert rows["a"]["outcome"] == "rejected"
    touch(raw, "0.mp4", b"same")  # comes later, so it is the copy although it sorts first
    assert next(r for r in plan(tmp_path).rows if r["video_id"] == "0")["detail"] == "as b"


def test_a_plan_never_changes_and_new_files_are_appended(tmp_path):
    for name in "abc":
        touch(tmp_path / "raw", f"{name}.mp4", name.encode() * ord(name))
    first = plan(tmp_path)
    assert plan(tmp_path).rows == first.rows
    touch(tmp_path / "raw", "0.mp4", b"12345")
    second = plan(tmp_path)
    assert second.rows[:3] == first.rows
    assert second.video_ids == ["a", "b", "c", "0"]
    assert set(second.units) > set(first.units)


def test_two_files_of_one_id_keep_apart(tmp_path):
    touch(tmp_path / "raw" / "one", "x.mp4", b"1")
    touch(tmp_path / "raw" / "two", "x.mp4", b"22")
    first, second = plan(tmp_path).video_ids
    assert first == "x"
    assert second.startswith("x~")


@pytest.mark.parametrize(("unit_s", "together"), [(3600.0, 2), (30.0, 1)])
def test_units_are_bounded_in_length_and_small_sources_get_sixteen(tmp_path, unit_s, together):
    for n in range(40):
        touch(tmp_path / "raw", f"{n:02}.mp4", b"x" * (n + 1), duration=30.0)
    units = [r["unit_id"] for r in plan(tmp_path, unit_s=unit_s).rows]
    assert max(units.count(u) for u in units) == together
    assert len(set(units)) >= 16


@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_the_split_has_its_share_and_is_stable(seed, share):
    names = [f"{seed}/{n}" for n in range(400)]
    held = [n for n in names if split_of(n, share) == "test"]
    assert abs(len(held) / len(names) - share) < 0.15
    assert all(split_of(n, min(1.0, share + 0.1)) == "test" for n in held)


def test_nothing_is_written_by_looking(tmp_path):
    touch(tmp_path / "raw", "a.mp4")
    rows = new_rows(tmp_path / "data", str(tmp_path / "raw"), settings(tmp_path, tmp_path / "raw"))
    assert [r["video_id"] for r in rows] == ["a"]
    assert not (tmp_path / "data").exists()


def test_another_size_for_the_same_dataset_is_refused(tmp_path):
    touch(tmp_path / "raw", "a.mp4")
    plan(tmp_path)
    with pytest.raises(UserError, match="choose another --name"):
        open_plan(tmp_path / "data", str(tmp_path / "raw"), settings(tmp_path, tmp_path / "raw"), "other")
    assert json.loads((tmp_path / "data" / "settings.json").read_text())["config_digest"] == "s"
