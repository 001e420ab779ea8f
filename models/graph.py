"""One decoding pass as one graph of kernels: fixed shapes, no question to the device, so that a GPU can replay it.

On a GPU a small world's pass is hundreds of launches that take longer than the work; a CUDA graph makes them one. All
slots take part in each pass: what an idle slot computes goes to the cell of its next frame, which is written again
before anything reads it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.attention import Clock

if TYPE_CHECKING:
    from models.sampler import Decoder

FACTS = 8
"""What a pass is told of a slot: keys of the frame and of the pass, passes done, tokens to be known after it, action,
position in time, frames cached, and whether it draws."""


def decoding_pass(decoder: "Decoder", told_SF: Tensor) -> None:
    """Run the dynamics over every slot's current tokens and draw in those that draw; told (slots, FACTS) int64."""
    current, dynamics = decoder.current, decoder.dynamics
    action, position, cached, draws = told_SF[:, 4:].unbind(1)
    shape = dynamics.cfg.transformer
    clock = Clock.at(
        slice(0, len(current)), position, position - cached, decoder.cells, shape.window, shape.head_size, decoder.dtype
    )
    features = dynamics.step(current, action, decoder.caches, clock, decoder.text)
    revealed = decoder.revealer.reveal(dynamics.finish(*features), current, told_SF)
    current.copy_(torch.where(draws[:, None] > 0, revealed, current))


class Replay:
    """`work`, captured once and replayed on a GPU; on a CPU it is simply called."""

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._run: Callable[[], None] = work
        if device.type == "cuda":
            side = torch.cuda.Stream(device)  # capture wants kernels and workspaces to be there already
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(3):
                    work()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                work()
            self._run = graph.replay

    def __call__(self) -> None:
        """Do the work again, on what its buffers hold now."""
        self._run()


class Pass:
    """Passes of a decoder from one buffer of facts.

    Args:
        decoder: with no session yet, as capturing runs passes.
    """

    def __init__(self, decoder: "Decoder") -> None:
        cuda = decoder.device.type == "cuda"
        self._facts = torch.zeros(decoder.slots, FACTS, dtype=torch.int64, pin_memory=cuda)
        self._told = self._facts.to(decoder.device, copy=True)
        self._copied = torch.cuda.Event() if cuda else None
        with torch.inference_mode():
            self._replay = Replay(lambda: decoding_pass(decoder, self._told), decoder.device)

    def __call__(self, facts: list[list[int]]) -> None:
        """One pass over all slots, with `FACTS` for each."""
        if self._copied is not None:
            self._copied.synchronize()  # of the facts before, so that they may be overwritten; the pass itself runs on
        self._facts.copy_(torch.tensor(facts))
        self._told.copy_(self._facts, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._replay()
