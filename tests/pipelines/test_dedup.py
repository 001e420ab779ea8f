import pytest

from pipelines.dedup import mark_same_frames
from pipelines.manifest import Plan
from pipelines.shards import VIDEO_SCHEMA, Unit, Writer, open_ledger
from pipelines.tables import write_shard

LEDGER = {
    "z": ("kept", "one"),
    "a": ("kept", "one"),
    "m": ("partial", "one"),
    "other": ("kept", "two"),
    "refused": ("rejected", "one"),
    "unread": ("dead_letter", None),
    "broken": ("dead_letter", None),
}


@pytest.fixture
def writer(home):
    folder = home.datasets / "d"
    rows = [
        {"uri": v, "video_id": v, "unit_id": "u", "outcome": outcome, "frames_digest": frames}
        for v, (outcome, frames) in LEDGER.items()
    ]
    write_shard(folder / "videos" / "u.parquet", rows, VIDEO_SCHEMA)
    made = Writer(folder)
    made.commit([Unit("u", None, folder / "videos" / "u.parquet")])
    return made


def plan(*order):
    return Plan([{"video_id": v, "unit_id": "u", "again": False} for v in order])


def outcomes(writer):
    return {
        r["video_id"]: (r["outcome"], r["detail"])
        for r in open_ledger(writer.folder, ["video_id", "outcome", "detail"])
    }


def test_the_first_planned_stays_whatever_its_name(writer):
    assert mark_same_frames(writer, plan("z", "a", "m", "other", "refused", "unread", "broken")) == 2
    assert outcomes(writer) == {
        **{v: (outcome, None) for v, (outcome, _) in LEDGER.items()},
        "a": ("duplicate", "as z"),
        "m": ("duplicate", "as z"),
    }


def test_once_marked_there_is_nothing_left_to_mark(writer):
    order = plan("z", "a", "m", "other", "refused", "unread", "broken")
    mark_same_frames(writer, order)
    before = outcomes(writer)
    assert mark_same_frames(writer, order) == 0
    assert outcomes(writer) == before
