"""Counter-based randomness: a draw is a hash of what it is for, so it can be repeated anywhere, in any order.

No generator state exists: resuming, another world size or another neighbour in the batch cannot change a draw.
"""

import torch
from torch import Tensor

_MASK53 = (1 << 53) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _MIX1, _MIX2 = (_signed(v) for v in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(*counters: Tensor | int, state: Tensor | None = None) -> Tensor:
    """Hash counters that broadcast together into int64 (SplitMix64's finaliser over each in turn).

    With `state`, the hash of counters before these, it goes on from there.
    """
    state = torch.zeros((), dtype=torch.int64) if state is None else state
    for counter in counters:
        state = (state.to(counter.device) if isinstance(counter, Tensor) else state) + counter + _GOLDEN
        state = (state ^ _shift(state, 30)) * _MIX1
        state = (state ^ _shift(state, 27)) * _MIX2
        state = state ^ _shift(state, 31)
    return state


def uniform(*counters: Tensor | int, state: Tensor | None = None) -> Tensor:
    """Draws in (0, 1), float32, one for each combination of the counters, which broadcast together; see `mix`."""
    return ((mix(*counters, state=state) & _MASK53).double() + 0.5).mul(2.0**-53).float().clamp_(1e-7, 1 - 1e-7)


def uniform_for(key_B: Tensor, stream: int, *shape: int) -> Tensor:
    """Draws (B, *shape) in (0, 1) for the samples' keys; `stream` keeps purposes apart."""
    index = torch.arange(torch.Size(shape).numel(), device=key_B.device).view(shape)
    return uniform(key_B.view(-1, *[1] * len(shape)), stream, index)
