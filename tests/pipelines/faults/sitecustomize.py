"""Gives the decoding child a decoder with native faults: put on PYTHONPATH, it touches no other process.

A file that begins with FAULT makes the decoder do what broken files do to real ones: crash, hang, eat memory.
"""

import sys

if "pipelines.unit" in sys.orig_argv:
    import ctypes
    import signal

    import av

    whole = av.open

    def faulty(file, *rest, **named):
        head = b""
        if named.get("mode") != "w":
            with open(file, "rb") as source:
                head = source.read(16)
        if head.startswith(b"FAULT segv"):
            ctypes.string_at(0)
        elif head.startswith(b"FAULT hang"):
            signal.pause()
        elif head.startswith(b"FAULT hog"):
            held = []
            while True:
                held.append(bytearray(64 << 20))
        return whole(file, *rest, **named)

    av.open = faulty
