import io

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pipelines.video import VideoError, decode_clip, encode_clip, probe, strip
from tests.pipelines.footage import scroll


@pytest.mark.parametrize(("codec", "floor_db"), [("h264_444", 34), ("h264_420", 20)])
def test_a_clip_comes_back(codec, floor_db):
    frames = scroll(40, size=48)
    data = encode_clip(frames, codec=codec)
    back = decode_clip(data)
    assert back.shape == frames.shape
    mse = ((back.astype(float) - frames) ** 2).mean()
    assert 10 * np.log10(255**2 / mse) > floor_db
    assert probe(io.BytesIO(data)).fps == 10


@given(start=st.integers(0, 39), count=st.integers(1, 40))
@examples(max_examples=40, deadline=None)
def test_a_window_is_the_same_as_that_part_of_the_whole(start, count):
    data, whole = _stored()
    if start + count > 40:
        with pytest.raises(VideoError, match="out_of_range"):
            decode_clip(data, start, count)
    else:
        assert (decode_clip(data, start, count) == whole[start : start + count]).all()


def _stored(cache={}):  # noqa: B006
    if not cache:
        cache["data"] = encode_clip(scroll(40, size=32))
        cache["whole"] = decode_clip(cache["data"])
    return cache["data"], cache["whole"]


def test_bytes_that_are_no_clip():
    with pytest.raises(VideoError, match="unreadable"):
        decode_clip(b"nothing")
    with pytest.raises(VideoError):
        decode_clip(encode_clip(scroll(40))[:-3000])


def test_a_strip_is_a_jpeg_of_all_frames():
    picture = cv2.imdecode(np.frombuffer(strip(list(scroll(5))), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (64, 320, 3)
    assert strip([]) == b""
