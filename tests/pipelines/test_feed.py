import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.config import UserError
from models.text import hashed_words
from pipelines.feed import Plan, Schedule, Source, local_batches, mix, stream, windows
from pipelines.train_config import FeedConfig
from tests.pipelines.clips import close, write_dataset

FEED = FeedConfig(windows_per_clip=3, clips_per_group=2)


def source(home, **changes):
    return Source(
        **{"home": home.path, "dataset": "toys@0", "split": "train", "frames": 8, "seed": 5, "feed": FEED, **changes}
    )


plans = st.builds(
    lambda lengths, cuts, seed, group, per: Plan(
        lengths, [cuts] * len(lengths), 4, seed, FeedConfig(windows_per_clip=per, clips_per_group=group)
    ),
    lengths=st.lists(st.integers(4, 30), min_size=1, max_size=9),
    cuts=st.lists(st.integers(1, 29), max_size=3),
    seed=st.integers(0, 2**31),
    group=st.integers(1, 5),
    per=st.integers(1, 4),
)


@given(plans)
@settings(max_examples=60, deadline=None)
def test_a_pass_visits_every_clip_equally_and_every_window_fits(plan):
    for turn in (0, 1):
        places = [plan.window(turn * plan.per_pass + n) for n in range(plan.per_pass)]
        visits = np.bincount([clip for clip, _ in places], minlength=len(plan.lengths))
        assert (visits[plan.usable] == plan.config.windows_per_clip).all()
        assert all(0 <= start <= plan.lengths[clip] - plan.frames for clip, start in places)


@given(plans)
@settings(max_examples=60, deadline=None)
def test_windows_avoid_cuts_wherever_a_clip_has_room(plan):
    for clip, start in (plan.window(n) for n in range(plan.per_pass)):
        crossing = [cut for cut in plan.cuts[clip] if start < cut < start + plan.frames]
        room = [s for s in range(plan.lengths[clip] - 3) if not any(s < c < s + 4 for c in plan.cuts[clip])]
        assert not crossing or not room


def test_a_sample_does_not_depend_on_who_asked_before():
    lengths = [20] * 7
    asked = Plan(lengths, [[]] * 7, 4, 3, FEED)
    forward = [asked.window(n) for n in range(60)]
    fresh = Plan(lengths, [[]] * 7, 4, 3, FEED)
    assert [fresh.window(n) for n in reversed(range(60))] == forward[::-1]
    assert [Plan(lengths, [[]] * 7, 4, 4, FEED).window(n) for n in range(60)] != forward


def test_neighbouring_samples_share_few_clips_so_that_readers_decode_each_once():
    plan = Plan([40] * 50, [[]] * 50, 4, 0, FEED)
    size = FEED.clips_per_group * FEED.windows_per_clip
    for group in range(50 // FEED.clips_per_group):
        assert len({plan.window(group * size + n)[0] for n in range(size)}) == FEED.clips_per_group


def test_keys_are_positive_and_spread():
    keys = [mix(seed, sample, 2) for seed in range(20) for sample in range(500)]
    assert len(set(keys)) == len(keys)
    assert min(keys) >= 0 and max(keys) < 2**63
    assert 0.45 < np.mean([key & 1 for key in keys]) < 0.55


@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 12), st.sets(st.integers(0, 12), max_size=4))
@settings(max_examples=80, deadline=None)
def test_skipped_batches_are_gone_and_the_others_keep_their_order(parts, micro, steps, skipped):
    schedule = Schedule(batch=parts * micro, micro_batch=micro, steps=steps, skipped=tuple(skipped))
    seen = [schedule.first_sample(m) + n for m in schedule.remaining(0) for n in range(micro)]
    wanted = [number for number in range(steps + len(skipped)) if number not in skipped][:steps]
    assert seen == [number * parts * micro + n for number in wanted for n in range(parts * micro)]


def test_batches_hold_the_frames_of_their_windows(home):
    made = write_dataset(home, cuts=(12,))
    opened = source(home).open()
    batch = opened.batch(7, 6)
    assert batch["frames"].shape == (6, 8, 32, 32, 3) and batch["frames"].dtype == np.uint8
    assert batch["sample"].tolist() == list(range(7, 13))
    assert len(set(batch["key"].tolist())) == 6
    for n in range(6):
        clip, start = opened.plan.window(7 + n)
        assert close(batch["frames"][n], made[opened.clip_id(clip)][start : start + 8]) < 4


def test_the_cache_is_bounded_and_changes_nothing(home):
    write_dataset(home)
    small = source(home, feed=FeedConfig(windows_per_clip=3, clips_per_group=2, cache_bytes=1)).open()
    large = source(home).open()
    assert np.array_equal(small.batch(0, 20)["frames"], large.batch(0, 20)["frames"])
    assert len(small._decoded) == 1
    assert len(large._decoded) == 4


def test_a_later_start_streams_the_rest_and_ranks_share_it(home):
    write_dataset(home)
    schedule = Schedule(batch=4, micro_batch=2, steps=5)
    whole = [b["sample"].tolist() for b in local_batches(source(home), schedule, 0)]
    assert whole == [[n, n + 1] for n in range(0, 20, 2)]
    assert [b["sample"].tolist() for b in local_batches(source(home), schedule, 3)] == whole[6:]
    assert [b["sample"].tolist() for b in local_batches(source(home), schedule, 3, 1, 2)] == whole[7::2]


@pytest.mark.parametrize(("rows", "copies"), [(5000, 1), (3, 1), (5000, 2)])
def test_ray_data_streams_the_same_batches_in_the_same_order(home, ray_cluster, monkeypatch, rows, copies):
    import ray.data

    monkeypatch.setattr("pipelines.feed.MOST_ROWS", rows)  # few: several micro-batches in each
    write_dataset(home)
    schedule = Schedule(batch=4, micro_batch=2, steps=6, skipped=(3,))
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    streamed = list(stream(source(home), schedule, 2, copies).iter_batches(batch_size=None, batch_format="numpy"))
    local = [batch for batch in local_batches(source(home), schedule, 2) for _ in range(copies)]
    assert len(streamed) == len(local) == 8 * copies
    for one, other in zip(streamed, local, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in ("frames", "sample", "key"))


def test_one_window_of_a_clip_is_decoded_alone_and_is_the_same(home):
    write_dataset(home, frames=40)
    alone, whole = (source(home, feed=FeedConfig(windows_per_clip=n)).open() for n in (1, 2))
    for sample in range(8):
        clip, start = alone.plan.window(sample)
        assert np.array_equal(alone.batch(sample, 1)["frames"][0], whole.clip(clip)[start : start + 8])
    assert not alone._decoded


def test_evaluation_windows_come_from_the_held_out_split(home):
    made = write_dataset(home, clips=6, test=2)
    shown = windows(home, "toys", "test", 24, 4, seed=0)
    held_out = [made["u0c004"], made["u0c005"]]
    assert shown.shape == (4, 24, 32, 32, 3)
    assert all(min(close(frames, clip) for clip in held_out) < 4 for frames in shown)


def test_clips_that_are_too_short_are_named(home):
    write_dataset(home, frames=24)
    with pytest.raises(UserError, match="no clip has 25 frames .the longest of 4 has 24."):
        source(home, frames=25).open()


def test_words_of_titles_come_along(home):
    write_dataset(home)
    batch = source(home, words=3, text_vocabulary=100).open().batch(0, 4)
    said = {tuple(row) for row in batch["text"].tolist()}
    assert said <= {tuple(hashed_words(f"Toy {n}", 3, 100)) for n in range(4)}
    assert len(said) > 1
    assert "text" not in source(home).open().batch(0, 1)
