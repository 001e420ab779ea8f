"""A session as a video file (the only codec code of serving)."""

import io
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np

from serving.pictures import decode_jpeg
from serving.store import Row

MIN_SIDE_PX = 256
"""Small worlds are enlarged by a whole factor, so that players of videos don't blur them."""


def session_mp4(rows: Iterable[Row], fps: float) -> bytes:
    """The frames of a session as H.264 mp4 that every browser plays (yuv420p)."""
    buffer = io.BytesIO()
    container = av.open(buffer, "w", format="mp4")
    with container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for i, row in enumerate(rows):
            frame = _enlarged(decode_jpeg(row.jpeg))
            if i == 0:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _enlarged(frame_HWC: np.ndarray) -> np.ndarray:
    """By a whole factor; an odd row or column is left out, which yuv420p can't have."""
    factor = max(1, -(-MIN_SIDE_PX // min(frame_HWC.shape[:2])))
    frame = frame_HWC.repeat(factor, 0).repeat(factor, 1)
    return np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
