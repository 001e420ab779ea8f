"""The commit logic under deaths at every write: what exists in the end is what an undisturbed run leaves, each once."""

import contextlib
from pathlib import Path

import deltalake
import pytest
from deltalake.exceptions import DeltaError
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from infra.config import Home, UserError
from pipelines import shards, tables
from pipelines.buckets import BucketPath, place
from pipelines.curate import _plainly, _recover
from pipelines.manifest import Plan, open_plan
from pipelines.shards import Writer, open_dataset
from pipelines.tables import delta_table
from tests.pipelines.footage import settings
from tests.pipelines.test_manifest import touch
from tests.pipelines.test_shards import unit


class Killed(BaseException):
    """What SIGKILL is to a process: nothing between it and the end runs that could tidy up."""


WRITES = [
    (Path, "replace"),
    (tables, "create_table_with_add_actions"),
    (deltalake.DeltaTable, "create_write_transaction"),
    (deltalake.DeltaTable, "update_incremental"),
    (deltalake.DeltaTable, "create_checkpoint"),
]


@contextlib.contextmanager
def dying(at, how, rival=lambda: None):
    """The process dies around its `at`-th write: "before" or "after" it, or a rival commits everything just before."""
    left = at

    def patched(real):
        def write(*rest, **named):
            nonlocal left
            left -= 1
            if left != 0:
                return real(*rest, **named)
            if how == "before":
                raise Killed
            if how == "rival":
                rival()
            out = real(*rest, **named)
            if how == "after":
                raise Killed
            return out

        return write

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in WRITES:
            patch.setattr(owner, name, patched(getattr(owner, name)))
        yield


def plan_of(numbers):
    """Units of one video each; the last decodes the first one's video once more."""
    rows = [{"unit_id": f"u{n:03}", "video_id": f"v{n}", "again": False} for n in numbers]
    return Plan([*rows, {"unit_id": "u900", "video_id": f"v{numbers[0]}", "again": True}])


def work(folder, plan, batch):
    """What the driver and its workers do, in one process. What decodes again is planned from what is committed."""
    writer = Writer(folder)
    for part in (Plan([row for row in plan.rows if not row["again"]]), plan):
        pending = _recover(writer, part)
        for first in range(0, len(pending), batch):
            done = [make(folder, plan, name) for name in pending[first : first + batch]]
            writer.commit(done, "units", plan.again)


def make(folder, plan, name):
    if name in plan.again:
        return unit(folder, 900, clips=2, video=plan.again[name])
    number = int(name[1:])
    return unit(folder, number, clips=number % 3)


def state(folder):
    """Every clip and ledger row that a reader sees."""
    far = isinstance(folder, BucketPath)
    dataset = open_dataset(Home("/none" if far else folder.parents[1]), str(folder) if far else folder.name)
    clips = dataset.clip_table(["clip_id", "video_id", "unit_id", "video"]).to_pylist()
    return clips, sorted(
        (r["video_id"], r["unit_id"]) for r in dataset.video_table(["video_id", "unit_id"]).to_pylist()
    )


deaths = st.lists(st.tuples(st.integers(1, 14), st.sampled_from(["before", "after", "rival"])), max_size=5)


@given(count=st.integers(1, 5), batch=st.integers(1, 3), deaths=deaths, every=st.sampled_from([1, 2, 20]))
@examples(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_deaths_between_writes_change_nothing(tmp_path_factory, count, batch, deaths, every):
    plan = plan_of(range(1, count + 1))
    calm, folder = (tmp_path_factory.mktemp(name) / "datasets" / "d" for name in ("calm", "wild"))
    work(calm, plan, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "CHECKPOINT_EVERY", every)
        patch.setattr(shards, "CHECKPOINT_EVERY", every)
        for at, how in deaths:
            with contextlib.suppress(Killed, DeltaError), dying(at, how, lambda: work(folder, plan, batch)):
                work(folder, plan, batch)
        work(folder, plan, batch)
        version = delta_table(folder / "videos").version()
        work(folder, plan, batch)
    assert delta_table(folder / "videos").version() == version  # a run more does nothing
    assert state(folder) == state(calm)


@pytest.mark.parametrize("far", [False, True])
def test_a_rival_who_was_first_is_not_repeated(tmp_path, bucket, far):
    """Delta itself refuses the second commit of a unit, whoever thinks to be alone; also in a bucket."""
    folder = place(f"{bucket[0]}/datasets/d{bucket[1]}") if far else tmp_path / "datasets" / "d"
    plan = plan_of([1, 2])
    work(folder, Plan(plan.rows[:1]), 1)
    rival = dying(3, "rival", lambda: work(folder, plan, 9))
    with pytest.raises(UserError, match="another run committed to .*[Cc]oncurrent"), _plainly(folder), rival:
        work(folder, plan, 1)
    before = state(folder)
    work(folder, plan, 1)
    assert state(folder) == before
    assert len(before[1]) == 2


@pytest.mark.parametrize(("at", "how"), [(1, "before"), (1, "after"), (2, "before"), (2, "after")])
def test_a_plan_is_there_whole_or_not_at_all(tmp_path, at, how):
    for name in "abc":
        touch(tmp_path / "raw", f"{name}.mp4", name.encode() * ord(name))
    with pytest.raises(Killed), dying(at, how):
        planned_rows(tmp_path)
    rows = planned_rows(tmp_path)
    assert [row["video_id"] for row in rows] == ["a", "b", "c"]
    assert planned_rows(tmp_path) == rows


def planned_rows(tmp_path):
    source = str(tmp_path / "raw")
    return open_plan(tmp_path / "data", source, settings(tmp_path, source), "s").rows
