import functools
import io

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pipelines.video import (
    VideoError,
    brightness,
    colours,
    decode_clip,
    encode_clip,
    encode_planes,
    probe,
    split_planes,
    strip,
)
from tests.pipelines.footage import scroll

CODECS = {"h264_444": 34, "h264_420": 20, "jpeg444": 33, "raw_zstd": 45}


@pytest.mark.parametrize(("codec", "floor_db"), CODECS.items())
def test_a_clip_comes_back(codec, floor_db):
    frames = scroll(40, size=48)
    data = encode_clip(frames, codec=codec)
    back = decode_clip(data)
    assert back.shape == frames.shape
    mse = ((back.astype(float) - frames) ** 2).mean()
    assert 10 * np.log10(255**2 / mse) > floor_db
    assert encode_clip(frames, codec=codec) == data
    assert codec == "raw_zstd" or probe(io.BytesIO(data)).fps == 10


def test_raw_clips_keep_every_bit():
    planes = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 24), np.uint8)
    data = encode_planes(planes, fps=10, codec="raw_zstd", crf=15)
    assert (decode_clip(data) == np.stack([colours(p) for p in planes])).all()
    for damaged in (data[:-40], data[:10], data[:20] + bytes(40)):
        with pytest.raises(VideoError, match="damaged"):
            decode_clip(damaged)


@given(picture=st.integers(0, 2**24 - 1))
def test_colours_and_planes_are_each_other_s_inverse(picture):
    colour = np.array([picture >> 16, picture >> 8 & 255, picture & 255], np.uint8)
    planes = split_planes(np.tile(colour, (2, 2, 1)))
    assert np.abs(colours(planes).astype(int) - colour).max() <= 3  # limited range has 219 levels
    assert abs(int(brightness(planes[None])[0, 0, 0]) - colour @ [0.299, 0.587, 0.114]) <= 2


@given(start=st.integers(0, 39), count=st.integers(1, 40))
@examples(max_examples=40, deadline=None)
@pytest.mark.parametrize("codec", CODECS)
def test_a_window_is_the_same_as_that_part_of_the_whole(codec, start, count):
    data, whole = _stored(codec)
    if start + count > 40:
        with pytest.raises(VideoError, match="out_of_range"):
            decode_clip(data, start, count)
    else:
        assert (decode_clip(data, start, count) == whole[start : start + count]).all()


@functools.cache
def _stored(codec):
    data = encode_clip(scroll(40, size=32), codec=codec)
    return data, decode_clip(data)


def test_bytes_that_are_no_clip():
    with pytest.raises(VideoError, match="unreadable"):
        decode_clip(b"nothing")
    with pytest.raises(VideoError):
        decode_clip(encode_clip(scroll(40))[:-3000])


def test_a_strip_is_a_jpeg_of_all_frames():
    picture = cv2.imdecode(np.frombuffer(strip(list(scroll(5))), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (64, 320, 3)
    assert strip([]) == b""
