"""Clips to batches: sample number -> window, the same whoever asks, wherever a run stopped, on however many workers.

A pass visits every clip once, in an order drawn from (seed, pass), and cuts `windows_per_clip` windows from it. Clips
are taken in groups and the windows of a group are shuffled together, so a reader decodes each clip once per visit.
"""

import functools
import itertools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from infra.config import Home, UserError
from models.text import fold, hashed_words
from pipelines.shards import Dataset, open_dataset
from pipelines.tokenize import TokenTable
from pipelines.train_config import FeedConfig
from pipelines.video import decode_clip

if TYPE_CHECKING:
    import ray.data

Batch = dict[str, np.ndarray]

MOST_ROWS = 5000


def mix(*numbers: int) -> int:
    """A 63-bit number from integers, as good as random; the key of a sample."""
    return (fold(*numbers) & 0xFFFFFFFFFFFFFFFF) >> 1


class Plan:
    """The order of samples: (seed, sample number) -> (clip number, first frame).

    Args:
        lengths: frames of each clip.
        cuts: for each clip the frames that begin a new scene.
        frames: T, frames of a window.
        seed: of the whole order.
        config: group size and windows per visit.

    Raises:
        UserError: there is no clip with T frames.
    """

    def __init__(
        self, lengths: Sequence[int], cuts: Sequence[Sequence[int]], frames: int, seed: int, config: FeedConfig
    ) -> None:
        self.usable = np.flatnonzero(np.asarray(lengths, dtype=np.int64) >= frames)
        if not len(self.usable):
            raise UserError(
                f"no clip has {frames} frames (the longest of {len(lengths)} has {max(lengths, default=0)}): "
                "curate more or longer video, or lower the model's frames"
            )
        self.lengths, self.cuts, self.frames, self.seed, self.config = lengths, cuts, frames, seed, config
        self._order = functools.lru_cache(2)(self._draw_order)
        self._slots = functools.lru_cache(4)(self._draw_slots)

    @property
    def per_pass(self) -> int:
        """Samples in which every clip is visited once."""
        return len(self.usable) * self.config.windows_per_clip

    def window(self, sample: int) -> tuple[int, int]:
        """Clip number and first frame of a sample."""
        turn, place = divmod(sample, self.per_pass)
        group, slot = divmod(place, self.config.clips_per_group * self.config.windows_per_clip)
        visit = int(self._slots(turn, group)[slot]) // self.config.windows_per_clip
        clip = int(self.usable[self._order(turn)[group * self.config.clips_per_group + visit]])
        starts = self.starts(clip)
        return clip, int(starts[mix(self.seed, sample, 1) % len(starts)])

    def starts(self, clip: int) -> np.ndarray:
        """First frames at which a window fits; off the cuts if any such is left."""
        every = np.arange(self.lengths[clip] - self.frames + 1)
        if not self.config.avoid_cuts or not len(self.cuts[clip]):
            return every
        crossing = np.zeros(len(every), dtype=bool)
        for cut in self.cuts[clip]:
            crossing[max(0, cut - self.frames + 1) : max(0, cut)] = True
        return every[~crossing] if not crossing.all() else every

    def _draw_order(self, turn: int) -> np.ndarray:
        return np.random.default_rng([self.seed, turn, 0]).permutation(len(self.usable))

    def _draw_slots(self, turn: int, group: int) -> np.ndarray:
        clips = min(self.config.clips_per_group, len(self.usable) - group * self.config.clips_per_group)
        return np.random.default_rng([self.seed, turn, 1, group]).permutation(clips * self.config.windows_per_clip)


class Samples(Protocol):
    """Numbered samples that can be read."""

    def batch(self, first: int, count: int) -> Batch:
        """Samples first..first+count-1, their numbers among them as `sample`."""
        ...


class Samplable(Protocol):
    """What a training learns from: opened by a reader, on any node."""

    @property
    def feed(self) -> FeedConfig:
        """How it is read."""
        ...

    @property
    def frames(self) -> int:
        """T of a sample."""
        ...

    def open(self) -> Samples:
        """The samples, readable."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a reader needs to open on any node."""

    home: Path
    dataset: str
    """`name@version`"""
    split: str
    frames: int
    """T"""
    seed: int
    feed: FeedConfig
    tokenizer: str | None = None
    """Tokenizer artifact whose tokens come along"""
    words: int = 0
    """Words of the clips' titles that come along"""
    text_vocabulary: int = 1
    """Words are hashed to so many"""

    def open(self) -> "Windows":
        """The windows, readable."""
        home = Home(self.home)
        dataset = open_dataset(home, self.dataset)
        tokens = TokenTable.open(dataset, self.tokenizer) if self.tokenizer else None
        return Windows(self, dataset, tokens)


class Windows:
    """Random access to training windows, with the clips decoded last kept at hand."""

    def __init__(self, source: Source, dataset: Dataset, tokens: TokenTable | None) -> None:
        self.source, self.dataset, self.tokens = source, dataset, tokens
        self.index = dataset.index(source.split, *(["title"] if source.words else []))
        cuts = self.index["cut_frames"].to_pylist()
        self.plan = Plan(
            self.index["n_frames"].to_pylist(), [c or [] for c in cuts], source.frames, source.seed, source.feed
        )
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._bytes = 0

    def batch(self, first: int, count: int) -> Batch:
        """Samples first..first+count-1: frames uint8 (B,T,H,W,3), key int64 (B,), sample int64 (B,), and with a
        tokenizer tokens int64 (B,T,N), with words text int64 (B,words)."""
        places = [self.plan.window(sample) for sample in range(first, first + count)]
        end = self.source.frames
        batch: Batch = {
            "sample": np.arange(first, first + count, dtype=np.int64),
            "key": np.array([mix(self.source.seed, s, 2) for s in range(first, first + count)], dtype=np.int64),
            "frames": np.stack([self._window(clip, start) for clip, start in places]),
        }
        if self.tokens is not None:
            batch["tokens"] = np.stack(
                [self.tokens.read(self.clip_id(clip))[start : start + end] for clip, start in places]
            ).astype(np.int64)
        if self.source.words:
            titles = (self.index["title"][clip].as_py() or "" for clip, _ in places)
            words = [hashed_words(title, self.source.words, self.source.text_vocabulary) for title in titles]
            batch["text"] = np.array(words, dtype=np.int64)
        return batch

    def clip_id(self, clip: int) -> str:
        """The id of a clip by its number in the index."""
        return self.index["clip_id"][clip].as_py()

    def _window(self, clip: int, start: int) -> np.ndarray:
        if self.source.feed.windows_per_clip == 1:  # this visit wants nothing else of the clip
            return decode_clip(self._stored(clip), start, self.source.frames)
        return self.clip(clip)[start : start + self.source.frames]

    def _stored(self, clip: int) -> bytes:
        return self.dataset.read_clips(self.index.slice(clip, 1))[0]

    def clip(self, clip: int) -> np.ndarray:
        """All frames of a clip, uint8 (n,H,W,3)."""
        if clip in self._decoded:
            self._decoded.move_to_end(clip)
            return self._decoded[clip]
        frames = decode_clip(self._stored(clip))
        self._decoded[clip] = frames
        self._bytes += frames.nbytes
        while self._bytes > self.source.feed.cache_bytes and len(self._decoded) > 1:
            self._bytes -= self._decoded.popitem(last=False)[1].nbytes
        return frames


class Reader:
    """Ray Data's actor: a row that names micro-batches becomes the micro-batches."""

    def __init__(self, source: Samplable, micro_batch: int, copies: int) -> None:
        self.windows, self.micro_batch, self.copies = source.open(), micro_batch, copies

    def __call__(self, row: dict[str, np.ndarray]) -> Iterator[Batch]:
        """For each first sample the copies of a micro-batch; the samples' numbers come along, for the loop to check."""
        for first in row["firsts"][0]:
            batch = self.windows.batch(int(first), self.micro_batch)
            yield from itertools.repeat(batch, self.copies)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which samples each micro-batch holds, from a step on; the same for every number of workers.

    `skipped` are numbers of whole batches that turned out bad and are passed over.
    """

    batch: int
    micro_batch: int
    steps: int
    skipped: tuple[int, ...] = ()

    @property
    def per_step(self) -> int:
        """Micro-batches of a step over all workers."""
        return self.batch // self.micro_batch

    def first_sample(self, micro: int) -> int:
        """First sample of a micro-batch."""
        step, part = divmod(micro, self.per_step)
        return self.batch_number(step) * self.batch + part * self.micro_batch

    def batch_number(self, step: int) -> int:
        """The batch that a step trains on: the step's number, moved on by the skipped batches before it."""
        number = step
        for bad in sorted(self.skipped):
            number += bad <= number
        return number

    def remaining(self, step: int) -> range:
        """Micro-batches from this step to the end."""
        return range(step * self.per_step, self.steps * self.per_step)


class Pace:
    """Naps in each turn of Ray Data's executor loop: when the buffers are full it has nothing to wait for and would
    spin (as read in Ray 2.60's streaming executor) and take its CPU time from the trainers."""

    nap_s = 0.05

    def before_execution_starts(self, executor: Any) -> None:
        """Nothing to do."""

    def on_execution_step(self, executor: Any) -> None:
        """The nap."""
        time.sleep(self.nap_s)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Nothing to do."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Nothing to do."""


def stream(source: Samplable, schedule: Schedule, step: int, copies: int = 1) -> "ray.data.Dataset":
    """The micro-batches from `step` on, in order, one block each.

    With `preserve_order` and blocks of equal size Ray Train deals them out in turn: micro-batch m goes to rank
    m modulo the number of workers; of `copies` that follow each other, one to each worker of a tensor group. Planning
    costs Ray a millisecond for each row, so a long training names several micro-batches in a row: never more than
    `MOST_ROWS` rows.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.custom_execution_callback_classes = cast(Any, [Pace])  # the four methods are its whole interface
    # after the last step there is still a result to write: then the workers start, and leave the last batch unread
    begin = min(step, schedule.steps - 1)
    firsts = [schedule.first_sample(micro) for micro in schedule.remaining(begin)]
    each = max(1, math.ceil(len(firsts) / MOST_ROWS))
    rows = [{"firsts": firsts[n : n + each]} for n in range(0, len(firsts), each)]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Reader,
        fn_constructor_args=(source, schedule.micro_batch, copies),
        batch_size=None,
        num_cpus=0,  # a share would keep a trainer off a node that is counted by whole CPUs
        compute=ray.data.ActorPoolStrategy(size=source.feed.readers),
    )
    if each * copies > 1:  # Ray would join small blocks: with this limit it ends one after each micro-batch
        sample_bytes = sum(column.nbytes for column in source.open().batch(firsts[0], 1).values())
        data.context.target_max_block_size = int(0.9 * sample_bytes * schedule.micro_batch)
        # two by default, and then it waits for the executor's next turn: a tenth of a second for two micro-batches
        data.context._max_num_blocks_in_streaming_gen_buffer = each * copies
    return data


def local_batches(source: Samplable, schedule: Schedule, step: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """The same micro-batches (of one rank) in this process, without Ray."""
    samples = source.open()
    for micro in schedule.remaining(step)[rank::world]:
        yield samples.batch(schedule.first_sample(micro), schedule.micro_batch)


def windows(home: Home, dataset: str, split: str, frames: int, count: int, seed: int) -> np.ndarray:
    """`count` windows for evaluation, uint8 (count,T,H,W,3), spread over all clips; without Ray."""
    feed = FeedConfig(windows_per_clip=1)
    opened = Source(home=home.path, dataset=dataset, split=split, frames=frames, seed=seed, feed=feed).open()
    return opened.batch(0, count)["frames"]
