"""Many players on one device: continuous batching at the refinement step, caches bounded in bytes.

One thread owns the decoder. Between two refinement passes it takes in the steps that arrived, so a session never waits
for another's frame to finish, and a batch is whatever is under way. Nothing here is durable: a lost cache is rebuilt
from the context that a gateway sends.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from models.config import DynamicsConfig, ModelError, SamplerConfig
from models.sampler import Decoder, Finished, Window
from models.text import hashed_words
from models.world import World
from serving.metrics import EngineMetrics
from serving.protocol import Context, ModelInfo, ModelUnavailable, Prompted, StepJob, Stepped

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class _Held:
    """A session that has a slot."""

    slot: int
    step: int
    """Newest finished step in the slot's cache."""
    busy: "_Pending | None" = None


@dataclass
class _Pending:
    """A step on its way."""

    job: StepJob
    future: "Future[Stepped | None]"
    arrived: float = field(default_factory=time.perf_counter)
    began: float = 0.0


@dataclass
class _Call:
    """Other work for the thread that owns the model."""

    function: Callable[[], object]
    future: "Future[object]"


class Engine:
    """A world with its decoder and the thread that runs it. Implements `serving.protocol.Model`.

    Args:
        world: the loaded world.
        reference: `name@version` it is served under.
        sampler: how frames are sampled.
        slots: most sessions in one batch.
        cache_bytes: bound on all caches together; at least one slot is made.
    """

    def __init__(
        self, world: World, *, reference: str, sampler: SamplerConfig, slots: int, cache_bytes: int = 2 * 2**30
    ) -> None:
        self.world = world
        self._metrics = EngineMetrics(reference)
        self._slot_bytes = one = Decoder(world, 1, sampler).slot_bytes
        self.slots = max(1, min(slots, cache_bytes // max(1, one)))
        self.decoder = Decoder(world, self.slots, sampler)
        height, width, _ = world.frame_shape
        self.info = ModelInfo(
            reference=reference,
            actions=world.action_count,
            height_px=height,
            width_px=width,
            fps=float(world.config.fps),
            prompt_frames=world.config.frames,
            words=world.dynamics.cfg.words,
        )
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._free = list(range(self.slots))
        self._inbox: queue.SimpleQueue[_Pending | _Call | None] = queue.SimpleQueue()
        self._waiting: deque[_Pending] = deque()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        log.info("engine ready | world %s | slots %d | bytes a slot %d", reference, self.slots, one)

    @property
    def alive(self) -> bool:
        """Whether the thread runs; once it has failed the replica must be replaced."""
        return self._thread.is_alive()

    async def ready(self) -> bool:
        """Whether a step could be computed now."""
        return self.alive

    async def prompt(self, frames_THWC: np.ndarray) -> Prompted:
        """Tokens of prompt frames, uint8 (T, H, W, 3) in the world's shape."""
        return await self._call(lambda: self._prompt(frames_THWC))

    async def step(self, job: StepJob) -> Stepped | None:
        """The next frame of a session; None when this replica has no cache of it at `job.step - 1`."""
        pending = _Pending(job, Future())
        self._inbox.put(pending)
        return await asyncio.wrap_future(pending.future)

    async def forget(self, session: str) -> None:
        """Frees a session's slot."""
        await self._call(lambda: self._drop(session))

    def warm_up(self) -> None:
        """One prompt and two steps, so that no player waits for compilation and first allocations."""
        height, width, channels = self.world.frame_shape
        blank = np.zeros((1, height, width, channels), np.uint8)
        prompted = self._submit(lambda: self._prompt(blank)).result()
        context: Context | None = Context(tokens_TN=prompted.tokens_TN, actions_T=prompted.actions_T)
        for step in (prompted.step + 1, prompted.step + 2):
            pending = _Pending(StepJob(session="", seed=0, step=step, action=0, context=context), Future())
            self._inbox.put(pending)
            pending.future.result()
            context = None
        self._submit(lambda: self._drop("")).result()

    def close(self) -> None:
        """Ends the thread; steps under way fail."""
        self._inbox.put(None)
        self._thread.join()

    def _submit(self, function: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()
        self._inbox.put(_Call(function, future))  # pyrefly: ignore[bad-argument-type]
        return future

    async def _call(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self._submit(function))

    # -- in the thread -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        """Take in, refine once, give out. An unexpected error ends the thread, and with it (health check) the replica:
        after it the caches can't be trusted."""
        try:
            while self._take_in():
                if sessions := sum(held.busy is not None for held in self._held.values()):
                    self._metrics.batch(sessions)
                for finished in self.decoder.advance():
                    self._give_out(finished)
        finally:
            self._fail_all()

    def _take_in(self) -> bool:
        """Everything that arrived; waits only when there is nothing to refine. False ends the thread."""
        block = not self.decoder.busy and not self._waiting  # busy includes commit passes after frames went out
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                break
            if item is None:
                return False
            if isinstance(item, _Call):
                _answer(item.future, item.function)
            else:
                self._waiting.append(item)
            block = False
        for _ in range(len(self._waiting)):
            pending = self._waiting.popleft()
            if not self._place(pending):
                self._waiting.append(pending)
        return True

    def _place(self, pending: _Pending) -> bool:
        """Starts a step, or answers that the context is missing; False when it must wait for a slot."""
        job = pending.job
        held = self._held.get(job.session)
        if held and held.busy:
            return False
        if job.context is None and (held is None or held.step != job.step - 1):
            self._metrics.miss()
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_result(None)
            return True
        if held is None:
            slot = self._find_slot()
            if slot is None:
                return False
            held = _Held(slot, job.step - 1)
        if pending.future.set_running_or_notify_cancel():
            self._held[job.session] = held
            self._begin(held, pending)
        elif job.session not in self._held:  # nobody waits for it any more
            self._free.append(held.slot)
        return True

    def _begin(self, held: _Held, pending: _Pending) -> None:
        job = pending.job
        try:
            if job.context is not None:
                self.decoder.release(held.slot)
                self.decoder.restore(held.slot, _window(job, self.world.dynamics.cfg))
            self.decoder.begin(held.slot, job.action)
        except ModelError as error:  # a context that doesn't fit the world: this job's fault, nobody else's
            self._drop(job.session)
            pending.future.set_exception(error)
            return
        pending.began = time.perf_counter()
        held.busy, held.step = pending, job.step
        self._held.move_to_end(job.session)
        self._metrics.held(len(self._held) * self._slot_bytes)

    def _find_slot(self) -> int | None:
        """A free slot, or that of the session that has been idle for the longest."""
        if not self._free:
            idle = next((name for name, held in self._held.items() if not held.busy), None)
            if idle is None:
                return None
            self._drop(idle)
        return self._free.pop()

    def _drop(self, session: str) -> None:
        held = self._held.pop(session, None)
        if held is not None:
            self.decoder.release(held.slot)
            self._free.append(held.slot)
            self._metrics.held(len(self._held) * self._slot_bytes)

    def _give_out(self, finished: Finished) -> None:
        held = next(h for h in self._held.values() if h.slot == finished.slot)
        pending, held.busy = held.busy, None
        if pending is None:
            return
        pending.future.set_result(
            Stepped(
                tokens_N=np.asarray(finished.tokens, np.uint16),
                frame_HWC=finished.frame.numpy(),
                context=len(self.decoder.window(finished.slot).tokens),
                queue_s=pending.began - pending.arrived,
                model_s=time.perf_counter() - pending.began,
            )
        )

    def _prompt(self, frames_THWC: np.ndarray) -> Prompted:
        window = self.world.prompt_window(torch.from_numpy(np.ascontiguousarray(frames_THWC)))
        frames_BTHWC = self.world.tokenizer.decode(torch.as_tensor(window.tokens)[None])
        return Prompted(
            step=int(window.step),
            tokens_TN=np.asarray(window.tokens, np.uint16),
            actions_T=np.asarray(window.actions, np.int64),
            frames_THWC=frames_BTHWC[0].cpu().numpy(),
        )

    def _fail_all(self) -> None:
        """Nobody waits for a thread that has ended."""
        waiting: list[_Pending | _Call] = [*self._waiting, *(h.busy for h in self._held.values() if h.busy)]
        while not self._inbox.empty():
            item = self._inbox.get()
            if item is not None:
                waiting.append(item)
        for item in waiting:
            if item.future.running() or item.future.set_running_or_notify_cancel():
                item.future.set_exception(ModelUnavailable("the replica's engine has stopped"))


def _window(job: StepJob, cfg: DynamicsConfig) -> Window:
    if job.context is None:
        raise ValueError("a window is made from a context")
    tokens = torch.from_numpy(job.context.tokens_TN.astype(np.int64))
    actions = torch.from_numpy(np.asarray(job.context.actions_T, np.int64))
    words = tuple(hashed_words(job.title, cfg.words, cfg.text_vocabulary))
    return Window(tokens=tokens, actions=actions, step=job.step - 1, seed=job.seed, text=words)


def _answer(future: "Future[object]", function: Callable[[], object]) -> None:
    """Runs a call for its caller; what is wrong with a prompt is the caller's, not the thread's."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except ModelError as error:
        future.set_exception(error)
