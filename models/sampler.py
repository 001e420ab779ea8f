"""Draws the tokens of new frames for many sessions at once, with an exact cache: one pass is over one frame, not T.

While a frame is refined, the keys and values of the frames before it are constants. A frame costs `steps` refinement
passes and one commit pass that rewrites the cache from its final tokens, after the frame was handed out. Sessions join
and leave between any two passes; what one draws is a function of its own tokens, actions, seed and step alone.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Clock
from models.config import ModelError, SamplerConfig
from models.graph import FACTS, Pass
from models.maskgit import Revealer, noise_keys, reveal_counts

if TYPE_CHECKING:
    from models.world import World

_IDLE, _REFINE, _COMMIT = range(3)


@dataclass
class Window:
    """All that rebuilds a session: tokens int64 (n, N), actions int64 (n-1,), index of the newest frame, seed.

    `text` are the hashed words of a world that knows text.
    """

    tokens: Tensor
    actions: Tensor
    step: int
    seed: int
    text: tuple[int, ...] = ()


@dataclass
class Finished:
    """A finished frame: its slot, tokens int64 (N,) and pixels uint8 (H, W, C), both in host memory."""

    slot: int
    tokens: Tensor
    frame: Tensor


@lru_cache
def rows_alone_equal_rows_together(
    shapes: tuple[tuple[int, int], ...], tokens: int, slots: int, place: tuple[str, torch.dtype, int]
) -> bool:
    """Whether matrix products give a slot the same bits alone and among others (measured, not assumed).

    `place` is device, type and number of threads. On a CPU with one thread they do; with several, the split of work
    depends on the batch.
    """
    device, dtype, _ = place
    generator = torch.Generator().manual_seed(0)
    for out, inner in shapes:
        x = torch.randn(slots, tokens, inner, generator=generator).to(device, dtype)
        weight = torch.randn(out, inner, generator=generator).to(device, dtype)
        alone = F.linear(x[:1], weight)
        if not all(torch.equal(F.linear(x[:n], weight)[:1], alone) for n in range(2, slots + 1)):
            return False
    return True


@dataclass
class _Slot:
    """What the host knows of a slot: its frames, its phase, and where its next frame goes in the cache."""

    window: Window
    phase: int = _IDLE
    passed: int = 0  # refinement passes of the current frame
    action: int = 0  # that leads to the current frame
    queued: int | None = None  # action for the next one
    position: int = 0  # in time, of the current frame
    cached: int = 0  # frames before it that the cache holds


class Decoder:
    """A batch of `slots` sessions over one world. `advance` runs one pass over all that have work.

    Memory past T frames follows the sampler's policy. Raises ModelError for actions, slots or windows out of range.

    Args:
        graph: run passes of fixed shapes over all slots (`models.graph`), captured where there is a GPU; None: there.

    Attributes:
        current: tokens of the frames under way, int64 (slots, N).
        text: hashed words of the sessions, int64 (slots, words).
        passes: frame-passes of the dynamics model so far (one frame of one slot each).
    """

    def __init__(self, world: "World", slots: int, sampler: SamplerConfig, graph: bool | None = None) -> None:
        self.world, self.slots, self.sampler = world, slots, sampler
        self.dynamics, self.tokenizer = world.dynamics.eval(), world.tokenizer.eval()
        self.frames, self.tokens = world.dynamics.cfg.frames, world.dynamics.cfg.tokens
        self.device, self.dtype = self.dynamics.head.weight.device, self.dynamics.head.weight.dtype
        self.passes = 0
        self._slots: list[_Slot | None] = [None] * slots
        (self.cells, self._pixel_cells), self._kept = self._memory()
        self.caches = self.dynamics.transformer.caches(slots, self.dynamics.tokens, self.cells)
        self._pixel_caches = self.tokenizer.decoder.caches(slots, self.tokens, self._pixel_cells)
        self.current = torch.zeros(slots, self.tokens, dtype=torch.int64, device=self.device)
        self.text = torch.zeros(slots, world.dynamics.cfg.words, dtype=torch.int64, device=self.device)
        self.revealer = Revealer(world.dynamics.cfg, sampler, self.device)
        self._counts = reveal_counts(self.tokens, sampler.steps)
        use_graph = self.device.type == "cuda" if graph is None else graph
        # in small frames one call for all places costs less than several for some
        self._whole = self.tokens * world.dynamics.cfg.transformer.width < 2**14
        self._graph = Pass(self) if use_graph else None
        self._together = use_graph or self._may_share()

    def _memory(self) -> tuple[tuple[int, int], int]:
        """Cells of the two caches, and frames kept when memory is full."""
        if self.sampler.policy != "rolling":
            kept = self.frames // 2 if self.sampler.policy == "epoch" else self.frames - 1
            return (self.frames, self.frames), kept
        reach = 1
        cells = []
        for name, cfg, trained in (
            ("dynamics", self.dynamics.cfg.transformer, self.frames),
            ("tokenizer's decoder", self.tokenizer.cfg.decoder, self.tokenizer.cfg.frames),
        ):
            if cfg.temporal and cfg.window >= trained:
                raise ModelError(
                    f"policy 'rolling' needs a {name} trained with a sliding window, but its window is {cfg.window} "
                    f"of {trained} frames; train with a smaller window or use policy 'epoch'"
                )
            layers = cfg.layers // 2 if cfg.attention == "st" else cfg.layers
            reach = max(reach, 1 + layers * (cfg.window - 1) * cfg.temporal)
            cells.append(cfg.window)
        return (cells[0], cells[1]), reach

    def _may_share(self) -> bool:
        place = (str(self.device), self.dtype, torch.get_num_threads())
        shapes = {
            tuple(m.weight.shape)
            for part in (self.dynamics, self.tokenizer)
            for m in part.modules()
            if isinstance(m, nn.Linear)
        }
        return rows_alone_equal_rows_together(tuple(sorted(shapes)), self.dynamics.tokens, self.slots, place)

    @property
    def slot_bytes(self) -> int:
        """Cache memory of one session."""
        return sum(cache.slot_bytes for cache in (*self.caches, *self._pixel_caches) if cache is not None)

    @property
    def busy(self) -> bool:
        """Whether a pass would do anything: a frame to refine, or a finished one to commit."""
        return any(slot is not None and slot.phase != _IDLE for slot in self._slots)

    # ------------------------------------------------------------------ sessions

    def restore(self, slot: int, window: Window) -> None:
        """Put a session into a free slot, rebuilt from its window: the same bits as if it had always been here."""
        self._check_slot(slot)
        if self._slots[slot] is not None:
            raise ModelError(f"slot {slot} is taken; release it first")
        self._slots[slot] = _Slot(self._checked(window))
        self.text[slot] = torch.tensor(self._session(slot).window.text, dtype=torch.int64)
        self._refill([slot])

    def window(self, slot: int) -> Window:
        """All that rebuilds the slot's session as of its last finished frame."""
        w = self._session(slot).window
        return replace(w, tokens=w.tokens.clone(), actions=w.actions.clone())

    def fork(self, source: int, slot: int) -> None:
        """Copy an idle session with its cache into a free slot: a branch, without computing anything."""
        session = self._session(source)
        self._check_slot(slot)
        if self._slots[slot] is not None or session.phase != _IDLE:
            raise ModelError(f"can't copy slot {source} to {slot}; the one must be idle, the other free")
        for cache in (*self.caches, *self._pixel_caches):
            if cache is not None:
                cache.copy(source, slot)
        self._slots[slot] = replace(session, window=self.window(source))
        self.text[slot] = self.text[source]

    def release(self, slot: int) -> None:
        """Forget the slot's session, whatever it is doing."""
        self._check_slot(slot)
        self._slots[slot] = None

    def begin(self, slot: int, action: int) -> None:
        """Ask for the slot's next frame after this action; it comes out of a later `advance`."""
        session = self._session(slot)
        if not 0 <= action < self.dynamics.cfg.actions:
            raise ModelError(f"action {action} is out of range; this world knows 0..{self.dynamics.cfg.actions - 1}")
        if session.phase == _REFINE or session.queued is not None:
            raise ModelError(f"slot {slot} is still drawing a frame; wait until it is finished")
        session.queued = action
        if session.phase == _IDLE:
            self._start(slot, session)

    def _session(self, slot: int) -> _Slot:
        self._check_slot(slot)
        session = self._slots[slot]
        if session is None:
            raise ModelError(f"slot {slot} holds no session; restore one first")
        return session

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ModelError(f"slot {slot} is out of range; this decoder has slots 0..{self.slots - 1}")

    def _checked(self, window: Window) -> Window:
        tokens = torch.as_tensor(window.tokens).to("cpu", torch.int64)
        actions = torch.as_tensor(window.actions).to("cpu", torch.int64).reshape(-1)
        most = max(self.frames, self._kept)
        if tokens.ndim != 2 or not 1 <= len(tokens) <= most or len(actions) != len(tokens) - 1:
            raise ModelError(
                f"a window has tokens {tuple(tokens.shape)} and {len(actions)} actions; "
                f"give 1..{most} frames and one action fewer"
            )
        self.tokenizer.check_tokens(tokens)
        if len(actions) and not 0 <= int(actions.min()) <= int(actions.max()) < self.dynamics.cfg.actions:
            raise ModelError(
                f"a window has actions {int(actions.min())}..{int(actions.max())}; "
                f"this world knows 0..{self.dynamics.cfg.actions - 1}"
            )
        words, vocabulary = self.dynamics.cfg.words, self.dynamics.cfg.text_vocabulary
        text = tuple(window.text) or (vocabulary,) * words
        if len(text) != words or not all(0 <= word <= vocabulary for word in text):
            raise ModelError(f"a window has the words {text}; this world takes {words} in 0..{vocabulary}")
        return Window(tokens, actions, int(window.step), int(window.seed), text)

    # ------------------------------------------------------------------ passes

    @torch.inference_mode()
    def advance(self) -> list[Finished]:
        """One pass over every slot with work -> the frames that it finished, in order of slots."""
        full = [i for i, s in enumerate(self._slots) if s is not None and s.phase == _COMMIT and self._full(s)]
        for group in [full] if self._together else [[i] for i in full]:
            self._refill(group)
        work = [i for i, s in enumerate(self._slots) if s is not None and s.phase != _IDLE]
        finished: list[Finished] = []
        for group in [work] if self._together else [[i] for i in work]:
            if group:
                finished += self._pass(group)
        return finished

    def _full(self, session: _Slot) -> bool:
        return self.sampler.policy != "rolling" and len(session.window.tokens) >= self.frames

    def _start(self, slot: int, session: _Slot) -> None:
        """Turn the queued action, if any, into a frame to refine."""
        session.phase, session.passed = _IDLE, 0
        if session.queued is not None:
            session.phase, session.action, session.queued = _REFINE, session.queued, None
            self.current[slot] = self.dynamics.mask_token

    @torch.inference_mode()
    def _refill(self, slots: list[int]) -> None:
        """Write caches anew from the kept frames of windows of one length, frame by frame: as commit passes do."""
        sessions = [self._session(i) for i in slots]
        for session in sessions:
            self._rewind(session)
        for frame in range(len(sessions[0].window.tokens) if sessions else 0):
            for slot, session in zip(slots, sessions, strict=True):
                w = session.window
                session.action = int(w.actions[frame - 1]) if frame else self.dynamics.no_action
                self.current[slot] = w.tokens[frame].to(self.device)
            self._compute(slots)
            if self.tokenizer.cfg.decoder.temporal:
                self._pixels(slots)
            for session in sessions:
                session.position += 1
                session.cached += 1
        for slot, session in zip(slots, sessions, strict=True):
            self._start(slot, session)

    def _rewind(self, session: _Slot) -> None:
        """Forget what memory has no room for, and stand before the first frame of the rest."""
        w, rolling = session.window, self.sampler.policy == "rolling"
        if rolling or self._full(session):
            w.tokens = w.tokens[-self._kept :]
            w.actions = w.actions[max(0, len(w.actions) - len(w.tokens) + 1) :]
        session.position = w.step - len(w.tokens) + 1 if rolling else 0
        session.cached = 0

    def _pass(self, group: list[int]) -> list[Finished]:
        """One pass over these slots: some refine a frame, some commit theirs."""
        drawing = self._compute(group)
        for i in group:
            if i not in drawing:
                session = self._session(i)
                session.position += 1
                session.cached += 1
                self._start(i, session)
        done = [i for i in drawing if self._session(i).passed == self.sampler.steps]
        return self._finish(done) if done else []

    def _compute(self, slots: list[int]) -> list[int]:
        """The dynamics over the slots' current tokens; draws in those that refine -> those."""
        drawing = [i for i in slots if self._session(i).phase == _REFINE]
        self.passes += len(slots)
        if self._graph is not None:
            self._graph([self._facts(i) for i in range(self.slots)])
        else:
            features, condition = self._features(slots)
            if drawing:
                rows = [slots.index(i) for i in drawing]
                self._reveal(drawing, features[rows], None if condition is None else condition[rows])
        for i in drawing:
            self._session(i).passed += 1
        return drawing

    def _facts(self, slot: int) -> list[int]:
        """See `graph.FACTS`. A slot without work stands at its next frame."""
        s = self._slots[slot]
        if s is None:
            return [0] * FACTS
        keys = noise_keys(s.window.seed, s.window.step + 1, s.passed)
        due = (*self._counts, self.tokens)[s.passed]
        return [*keys, s.passed, due, s.action, s.position, s.cached, s.phase == _REFINE]

    def _reveal(self, slots: list[int], features: Tensor, condition: Tensor | None) -> None:
        """Draw the unknown tokens of the slots and keep as many as the schedule says; never waits for the device."""
        rows, current = self._rows(slots), self.current[self._rows(slots)]
        facts = [self._facts(i) for i in slots]
        told = torch.tensor(facts, device=self.device)
        if self._whole:
            self.current[rows] = self.revealer.reveal(self.dynamics.finish(features, condition), current, told)
            return
        unknown = [self.tokens - (0, *self._counts)[f[2]] for f in facts]
        # Known tokens need no logits. How many are unknown follows from the schedule, so shapes need no answer from the
        # device. One product for each slot: beside others' rows its own could round differently.
        order = (current != self.dynamics.mask_token).byte().argsort(dim=-1, stable=True)
        places = [row[:n] for row, n in zip(order, unknown, strict=True)]
        conditions = [None] * len(slots) if condition is None else condition
        logits = [self.dynamics.finish(x, c, p) for x, c, p in zip(features, conditions, places, strict=True)]
        at = torch.cat([place + self.tokens * row for row, place in enumerate(places)])
        token, score = self.revealer.drawn(
            torch.cat(logits) if len(logits) > 1 else logits[0], torch.cat(places), *told[at // self.tokens, :3].T
        )
        token = current.flatten().scatter(0, at, token).view_as(current)
        score = score.new_full((current.numel(),), torch.inf).scatter(0, at, score).view_as(current)
        self.current[rows] = self.revealer.kept(token, score, told[:, 3])

    def _finish(self, slots: list[int]) -> list[Finished]:
        """Decode the finished frames and hand them out; their commit pass comes later."""
        frames, tokens = self._pixels(slots).cpu(), self.current[self._rows(slots)].to("cpu", copy=True)
        finished = []
        for i, frame, drawn in zip(slots, frames, tokens, strict=True):
            session = self._session(i)
            w = session.window
            w.tokens = torch.cat((w.tokens, drawn[None]))
            w.actions = torch.cat((w.actions, torch.tensor([session.action])))
            if self.sampler.policy == "rolling":
                w.tokens, w.actions = w.tokens[-self._kept :], w.actions[-(self._kept - 1) :]
            w.step += 1
            session.phase = _COMMIT
            finished.append(Finished(i, drawn, frame))
        return finished

    def _rows(self, slots: list[int]) -> slice | Tensor:
        """As a slice where slots are neighbours, so that caches are not copied."""
        if slots[-1] - slots[0] + 1 == len(slots):
            return slice(slots[0], slots[-1] + 1)
        return torch.tensor(slots, device=self.device)

    def _clock(self, slots: list[int], cells: int, window: int, size: int) -> Clock:
        sessions = [self._session(i) for i in slots]
        position, cached = torch.tensor([[s.position, s.cached] for s in sessions], device=self.device).T
        stands = {s.position for s in sessions}
        used, same = min(cells, 1 + max(stands)), stands.pop() % cells if len(stands) == 1 else None
        return Clock.at(self._rows(slots), position, position - cached, cells, window, size, self.dtype, used, same)

    def _features(self, slots: list[int]) -> tuple[Tensor, Tensor | None]:
        """One pass of the dynamics over the slots' current tokens, see `Dynamics.step`; writes their cells."""
        cfg = self.dynamics.cfg.transformer
        action = torch.tensor([self._session(i).action for i in slots], device=self.device)
        clock = self._clock(slots, self.cells, cfg.window, cfg.head_size)
        rows = self._rows(slots)
        return self.dynamics.step(self.current[rows], action, self.caches, clock, self.text[rows])

    def _pixels(self, slots: list[int]) -> Tensor:
        """Frames uint8 (S, H, W, C) of the slots' current tokens; writes the tokenizer decoder's cells."""
        cfg = self.tokenizer.cfg.decoder
        clock = self._clock(slots, self._pixel_cells, cfg.window, cfg.head_size)
        return self.tokenizer.decoder_step(self.current[self._rows(slots)], self._pixel_caches, clock)
