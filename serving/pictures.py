"""Pictures in and out: prompts that strangers send, checked before they are decoded, and frames as JPEG."""

import struct

import cv2
import numpy as np

from serving.config import Limits
from serving.protocol import Problem

JPEG_QUALITY = 92
"""With 4:4:4 chroma: worlds are small and often pixel art, where halved chroma shows."""


def read_picture(data: bytes, *, height_px: int, width_px: int, limits: Limits) -> np.ndarray:
    """A stranger's picture as one frame of a world: upright, cropped to the world's shape, resized.

    The header is read first, so that a picture which would unpack to gigabytes costs nothing (a 31 KB PNG can hold
    16000 x 16000 pixels). Transparent pixels lie on black.

    Returns:
        uint8 (height_px, width_px, 3), RGB.

    Raises:
        Problem: 413 too many bytes or pixels, 415 not PNG, JPEG or WebP, 422 broken or too narrow.
    """
    if len(data) > limits.picture_bytes:
        raise too_large(limits.picture_bytes)
    height, width = _header_size(data)
    if height * width > limits.picture_px:
        raise Problem(
            413, "picture-too-large", f"the picture has {width} x {height} pixels: send at most {limits.picture_px}",
            limit_px=limits.picture_px,
        )  # fmt: skip
    if min(height, width) < limits.picture_side_px:
        raise Problem(
            422, "picture-too-narrow", f"the picture is {width} x {height}: a side has at least "
            f"{limits.picture_side_px} pixels", limit_px=limits.picture_side_px,
        )  # fmt: skip
    return fit(_decode(data), height_px, width_px)


def too_large(limit_bytes: int) -> Problem:
    """The refusal of a body over the limit."""
    return Problem(
        413, "body-too-large", f"the request has more than {limit_bytes} bytes: send less", limit_bytes=limit_bytes
    )


def encode_jpeg(frame_HWC: np.ndarray) -> bytes:
    """A frame, uint8 RGB (H, W, 3), as JPEG; equal frames give equal bytes."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]  # fmt: skip
    ok, data = cv2.imencode(".jpg", np.ascontiguousarray(frame_HWC[:, :, ::-1]), options)
    if not ok:
        raise ValueError(f"OpenCV could not encode a frame of shape {frame_HWC.shape}, {frame_HWC.dtype}")
    return data.tobytes()


def decode_jpeg(data: bytes) -> np.ndarray:
    """One of our own JPEG frames as uint8 RGB (H, W, 3)."""
    frame = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if frame is None:
        raise ValueError(f"{len(data)} bytes that should be a JPEG frame are not one")
    return np.ascontiguousarray(frame[:, :, ::-1])


def _decode(data: bytes) -> np.ndarray:
    """RGB pixels of a picture whose header is fine."""
    flat = np.frombuffer(data, np.uint8)
    try:
        # Unchanged keeps the alpha of a PNG; for JPEG the colour mode also turns by EXIF and unfolds CMYK and grey.
        mode = cv2.IMREAD_UNCHANGED if data[:4] == b"\x89PNG" or data[:4] == b"RIFF" else cv2.IMREAD_COLOR
        picture = cv2.imdecode(flat, mode)
    except cv2.error as error:
        raise Problem(422, "picture-broken", f"the picture can't be decoded: {error.err}") from error
    if picture is None:
        raise Problem(422, "picture-broken", "the picture can't be decoded: it is cut off or damaged")
    if picture.dtype == np.uint16:
        picture = (picture // 256).astype(np.uint8)
    if picture.ndim == 2 or picture.shape[2] == 1:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
    if picture.shape[2] == 4:
        alpha = picture[:, :, 3:].astype(np.uint16)
        picture = (picture[:, :, :3] * alpha // 255).astype(np.uint8)
    return np.ascontiguousarray(picture[:, :, ::-1])


def fit(picture: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """A picture, uint8 (H, W, 3), in a world's shape: cropped around its middle, averaged down or grown by pixels."""
    height, width = picture.shape[:2]
    scale = min(height / height_px, width / width_px)
    crop_h, crop_w = max(1, round(height_px * scale)), max(1, round(width_px * scale))
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    part = picture[top : top + crop_h, left : left + crop_w]
    how = cv2.INTER_AREA if scale > 1 else cv2.INTER_NEAREST
    return cv2.resize(part, (width_px, height_px), interpolation=how)


def _header_size(data: bytes) -> tuple[int, int]:
    """Height and width from a header, nothing decoded.

    Raises:
        Problem: 415 for another format, 422 for a header that is cut off.
    """
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", data, 16)
            return height, width
        if data[:2] == b"\xff\xd8":
            return _jpeg_size(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_size(data)
    except (struct.error, IndexError) as error:
        raise Problem(422, "picture-broken", "the picture ends inside its header") from error
    raise Problem(415, "not-a-picture", "a prompt is a PNG, JPEG or WebP picture; this is none of them")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walks the markers of a JPEG to its start of frame (ITU T.81, annex B)."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise Problem(422, "picture-broken", f"no JPEG marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return height, width
        at += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD8 else 2 + struct.unpack_from(">H", data, at + 2)[0]


def _webp_size(data: bytes) -> tuple[int, int]:
    """Canvas of a WebP (RFC 9649, section 2); an animated one gives its first frame, so its canvas counts."""
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF
