"""A session as a video file (the only codec code of serving)."""

import io
from collections.abc import Iterable
from fractions import Fraction

import av

from serving.pictures import decode_jpeg
from serving.store import Row

MIN_SIDE_PX = 256
"""Small worlds are enlarged by a whole factor, so that players of videos don't blur them."""


def session_mp4(rows: Iterable[Row], fps: float) -> bytes:
    """The frames of a session as H.264 mp4 that every browser plays (yuv420p, index first)."""
    buffer = io.BytesIO()
    container = av.open(buffer, "w", format="mp4", options={"movflags": "faststart"})
    with container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16", "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for row in rows:
            frame = decode_jpeg(row.jpeg)
            factor = max(1, -(-MIN_SIDE_PX // min(frame.shape[:2])))
            frame = frame.repeat(factor, 0).repeat(factor, 1)
            frame = frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]
            stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
