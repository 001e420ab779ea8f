"""Numbers from numbers and words, on the host and without torch: readers of data want them, too."""

import re
from zlib import crc32

_MASK64 = (1 << 64) - 1


def fold(*counters: int, state: int = 0) -> int:
    """Hash integers to 64 bits, signed (SplitMix64's finaliser over each in turn); `noise.mix`, or this with
    `state`, can go on from there."""
    for counter in counters:
        state = (state + counter + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state - (1 << 64) if state >> 63 else state


def hashed_words(text: str, count: int, vocabulary: int) -> list[int]:
    """The first `count` words of a text as numbers below `vocabulary`, which itself stands for "no word"."""
    found = [crc32(word.encode()) % vocabulary for word in re.findall(r"\w+", text.casefold())[:count]]
    return found + [vocabulary] * (count - len(found))
