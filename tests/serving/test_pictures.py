import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from serving.config import Limits
from serving.pictures import decode_jpeg, encode_jpeg, read_picture
from serving.protocol import Problem

LIMITS = Limits()


def scene(height=48, width=96):
    """Left third red, middle green, right blue."""
    picture = np.zeros((height, width, 3), np.uint8)
    for i in range(3):
        picture[:, i * width // 3 : (i + 1) * width // 3, i] = 255
    return picture


def encoded(picture_rgb, kind=".png", *options):
    pixels = picture_rgb if picture_rgb.ndim == 2 else picture_rgb[..., [2, 1, 0, 3][: picture_rgb.shape[2]]]
    return cv2.imencode(kind, np.ascontiguousarray(pixels), list(options))[1].tobytes()


def read(data, height_px=64, width_px=64):
    return read_picture(data, height_px=height_px, width_px=width_px, limits=LIMITS)


def png(width, height, bits=8, kind=2, data=b""):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", [".png", ".jpg", ".webp"])
def test_a_picture_is_cropped_around_its_middle_and_resized(kind):
    frame = read(encoded(scene(), kind))
    assert frame.shape == (64, 64, 3)
    assert frame.dtype == np.uint8
    assert frame[32, 32].argmax() == 1, "the middle stays in the middle, and RGB stays RGB"
    assert frame[32, 2].argmax() == 0
    assert frame[32, 61].argmax() == 2


def test_small_pictures_grow_by_whole_pixels():
    frame = read(encoded(scene(16, 16)))
    blocks = frame.reshape(16, 4, 16, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


@pytest.mark.parametrize(
    ("picture", "want"),
    [
        (np.full((32, 32), 200, np.uint8), (200, 200, 200)),  # grey
        (np.full((32, 32, 3), 0xC8C8, np.uint16), (200, 200, 200)),  # 16 bits
        (np.dstack([np.full((32, 32, 3), 200, np.uint8), np.full((32, 32), 128, np.uint8)]), (100, 100, 100)),  # alpha
        (np.full((32, 32), 0xC8C8, np.uint16), (200, 200, 200)),
    ],
)
def test_unusual_pixels_become_plain_ones(picture, want):
    assert read(encoded(picture))[30, 30].tolist() == pytest.approx(want, abs=1)


def test_a_palette_is_resolved():
    body = b"".join(b"\0" + b"\1" * 16 for _ in range(16))
    data = png(16, 16, kind=3, data=body)
    plte = struct.pack(">I", 6) + b"PLTE" + bytes([0, 0, 0, 10, 200, 30])
    plte += struct.pack(">I", zlib.crc32(plte[4:]))
    at = data.index(b"IDAT") - 4
    assert read(data[:at] + plte + data[at:])[5, 5].tolist() == [10, 200, 30]


def test_a_turned_photograph_is_set_upright():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # orientation 6: turn right
    jpeg = encoded(scene(96, 96), ".jpg")
    data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    frame = read(data)
    assert [frame[y, 32].argmax() for y in (4, 32, 60)] == [0, 1, 2], "what was left is on top"


def saved(kind, pictures, mode="RGB", **options):
    """What another program's encoder makes of pictures."""
    first, *more = [Image.fromarray(p).convert(mode) for p in pictures]
    file = io.BytesIO()
    first.save(file, kind, **({"save_all": True, "append_images": more} if more else {}), **options)
    return file.getvalue()


def test_a_picture_in_printing_colours_is_read():
    frame = read(saved("JPEG", [scene()], "CMYK", quality=95))
    assert frame[32, 32].argmax() == 1
    assert frame[32, 2].argmax() == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_a_moving_picture_the_first_frame_counts(kind):
    moving = saved(kind, [scene(), 255 - scene()], **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(read(moving), read(saved(kind, [scene()], **({"lossless": True} if kind == "WEBP" else {}))))


def test_a_bomb_is_refused_from_its_header():
    bomb = png(16000, 16000, data=bytes(1 << 16))
    with pytest.raises(Problem, match="16000 x 16000") as refused:
        read(bomb)
    assert refused.value.status == 413
    assert refused.value.extra == {"limit_px": LIMITS.picture_px}


def webp_header(width, height):
    return b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


@pytest.mark.parametrize(
    "bomb",
    [
        webp_header(16000, 16000),
        b"RIFF\0\0\0\0WEBPVP8L" + bytes(5) + struct.pack("<I", 16000 | 16000 << 14),
        b"RIFF\0\0\0\0WEBPVP8 " + bytes(10) + struct.pack("<HH", 16000, 16000),
        b"\xff\xd8\xff\xe0\x00\x04xx\xff\xff\xc2\x00\x11\x08" + struct.pack(">HH", 16000, 16000),
    ],
)
def test_every_format_tells_its_size_before_it_is_decoded(bomb):
    with pytest.raises(Problem) as refused:
        read(bomb)
    assert refused.value.status == 413


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 415),
        (b"hello, I am no picture", 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1/'/></svg>", 415),
        (b"%PDF-1.4 \x89PNG\r\n\x1a\n", 415),
        (b"GIF89a" + bytes(40), 415),
        (encoded(scene())[:20], 422),
        (encoded(scene())[:60], 422),
        (encoded(scene(), ".jpg")[:6], 422),
        (b"\xff\xd8\x00\x00", 422),
        (encoded(scene(1, 1)), 422),
        (png(60000, 1, data=bytes(180001)), 422),
    ],
)
def test_what_is_no_picture_says_so(data, status):
    with pytest.raises(Problem) as refused:
        read(data)
    assert refused.value.status == status
    assert refused.value.detail


@given(st.binary(max_size=200), st.sampled_from([b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8", b"RIFF\0\0\0\0WEBP"]))
def test_no_bytes_crash_the_reader(tail, head):
    try:
        assert read(head + tail).shape == (64, 64, 3)
    except Problem as problem:
        assert problem.status in (413, 415, 422)


def test_too_many_bytes_are_refused_unread():
    small = Limits(picture_bytes=100)
    with pytest.raises(Problem) as refused:
        read_picture(encoded(scene()) + bytes(200), height_px=8, width_px=8, limits=small)
    assert refused.value.extra == {"limit_bytes": 100}


def test_frames_come_back_from_jpeg_nearly_unchanged_and_always_the_same():
    frame = cv2.resize(scene(), (64, 40), interpolation=cv2.INTER_AREA)
    data = encode_jpeg(frame)
    assert data == encode_jpeg(frame.copy())
    assert np.abs(decode_jpeg(data).astype(int) - frame).mean() < 3
