"""What becomes of freed memory."""

import ctypes

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)


def keep_freed_memory() -> None:
    """Makes this process keep what it frees for what it asks for next; does nothing where the C library is not glibc.

    A training step asks for the same large blocks again and again. glibc gives them back to the kernel, which must then
    map and zero them anew: a twentieth of a step on a CPU. The price is that memory stays at its highest.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP, 2**30)
        mallopt(_TRIM, 2**31 - 1)
