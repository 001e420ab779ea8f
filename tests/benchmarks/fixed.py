"""A decoder that takes 5 ms for a pass whatever the batch, in the place of a world's own: what is left is serving."""

import time

import numpy as np
import torch

from models.sampler import Decoder, Finished, Window

FIXED_FPS = 240.0
"""Worlds with this rate get the fixed decoder."""
PASS_S = 0.005
FRAME = torch.from_numpy(
    np.kron(np.arange(90 * 160, dtype=np.uint8).reshape(90, 160)[::10, ::10], np.ones((10, 10), np.uint8))
)
PICTURE = FRAME[..., None].repeat(1, 1, 3).contiguous()
"""160 x 90: what a JPEG and a copy cost at the size of the paper's worlds."""


class FixedDecoder:
    """`models.sampler.Decoder` as the engine uses it, with sleeping for computing. One pass finishes a frame."""

    slot_bytes = 1

    def __init__(self, slots):
        self._windows, self._drawing, self._tokens = [None] * slots, set(), torch.zeros(920, dtype=torch.int64)

    @property
    def busy(self):
        return bool(self._drawing)

    def restore(self, slot, window):
        self._windows[slot] = window

    def release(self, slot):
        self._windows[slot] = None
        self._drawing.discard(slot)

    def window(self, slot):
        return Window(self._tokens[None], torch.zeros(0, dtype=torch.int64), 0, 0)

    def begin(self, slot, action):
        self._drawing.add(slot)

    def advance(self):
        if not self._drawing:
            return []
        time.sleep(PASS_S)
        done, self._drawing = sorted(self._drawing), set()
        return [Finished(slot, self._tokens, PICTURE) for slot in done]


def decoder(world, slots, sampler):
    """The world's decoder, or the fixed one for a world that asks for it."""
    return FixedDecoder(slots) if world.config.fps == FIXED_FPS else Decoder(world, slots, sampler)


def install():
    """For every process of a server under measurement."""
    import serving.engine

    serving.engine.Decoder = decoder
