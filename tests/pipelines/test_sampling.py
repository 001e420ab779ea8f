from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pipelines.sampling import CutDetector, Sampler, find_bars, fit, luma_grid
from pipelines.unit import curate_video
from tests.pipelines.footage import film, film_as, scroll, settings, sidecar, sound

LONG = scroll(90)
NTSC = Fraction(30000, 1001)


def wide(frames, width, height):
    return np.stack([cv2.resize(f, (width, height), interpolation=cv2.INTER_NEAREST) for f in frames])


def cut_off(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def rotten(path):
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(len(data) // 4, len(data), 60):
        data[at] ^= 0xFF
    path.write_bytes(data)


def slides():
    return np.repeat(np.stack([scroll(1, seed=s)[0] for s in range(5)]), 18, axis=0)


def blurred():
    return np.stack([cv2.GaussianBlur(f, (0, 0), 7) for f in scroll(90, speed=4)])


def raw(path, content):
    path.write_bytes(content)
    sidecar(path)


def png():
    return cv2.imencode(".png", LONG[0])[1].tobytes()


def barred(rows, columns, size=120):
    """`LONG` between black bars."""
    inner = np.stack(
        [cv2.resize(f, (size - 2 * columns, size - 2 * rows), interpolation=cv2.INTER_NEAREST) for f in LONG]
    )
    return np.pad(inner, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


def with_cover(path):
    """A video whose first stream is its cover picture."""
    film_as(path, LONG)
    with av.open(str(path)) as source, av.open(str(path.with_suffix(".mov")), "w", format="mov") as target:
        cover = target.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = target.add_stream_from_template(source.streams.video[0])
        still = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        still.pts, still.time_base = 0, Fraction(1)
        target.mux(cover.encode(still))
        target.mux(cover.encode())
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    path.with_suffix(".mov").replace(path)


AWKWARD = {
    "h264.mp4": (lambda p: film_as(p, LONG), "kept", ""),
    "h264_444.mkv": (lambda p: film_as(p, LONG, pixels="yuv444p"), "kept", ""),
    "h264_10bit.mkv": (lambda p: film_as(p, LONG, pixels="yuv420p10le"), "kept", ""),
    "h264_full_range.mp4": (lambda p: film_as(p, LONG, pixels="yuvj420p"), "kept", ""),
    "h264_gray.mp4": (lambda p: film_as(p, LONG, pixels="gray"), "kept", ""),
    "h264_bframes.mov": (lambda p: film_as(p, LONG, bf="3", g="40"), "kept", ""),
    "hevc.mp4": (lambda p: film_as(p, LONG, codec="libx265", **{"x265-params": "log-level=0"}), "kept", ""),
    "hevc_10bit.mkv": (
        lambda p: film_as(p, LONG, codec="libx265", pixels="yuv420p10le", **{"x265-params": "log-level=0"}),
        "kept",
        "",
    ),
    "vp9.webm": (lambda p: film_as(p, LONG, codec="libvpx-vp9", deadline="realtime"), "kept", ""),
    "vp8.webm": (lambda p: film_as(p, LONG, codec="libvpx", deadline="realtime"), "kept", ""),
    "av1.mp4": (lambda p: film_as(p, LONG, codec="libsvtav1", preset="12"), "kept", ""),
    "mpeg4.avi": (lambda p: film_as(p, LONG, codec="mpeg4"), "kept", ""),
    "msmpeg4.avi": (lambda p: film_as(p, LONG, codec="msmpeg4"), "kept", ""),
    "mjpeg.avi": (lambda p: film_as(p, LONG, codec="mjpeg", pixels="yuvj420p"), "kept", ""),
    "mpeg2.ts": (lambda p: film_as(p, LONG, codec="mpeg2video", fps=Fraction(25)), "kept", ""),
    "mpeg1.mpg": (lambda p: film_as(p, LONG, codec="mpeg1video", fps=Fraction(25)), "kept", ""),
    "flash.flv": (lambda p: film_as(p, LONG, codec="flv"), "kept", ""),
    "windows.wmv": (lambda p: film_as(p, LONG, codec="wmv2"), "kept", ""),
    "prores.mov": (lambda p: film_as(p, LONG, codec="prores", pixels="yuv422p10le"), "kept", ""),
    "huffyuv.avi": (lambda p: film_as(p, LONG, codec="huffyuv", pixels="rgb24"), "kept", ""),
    "odd_size.mkv": (lambda p: film_as(p, wide(LONG, 65, 63), codec="ffv1", pixels="yuv444p"), "kept", ""),
    "rotated_90.mp4": (lambda p: film_as(p, LONG, rotation=90), "kept", ""),
    "rotated_180.mp4": (lambda p: film_as(p, LONG, rotation=180), "kept", ""),
    "portrait.mp4": (lambda p: film_as(p, wide(LONG, 64, 112)), "rejected", "portrait"),
    "portrait_turned.mp4": (lambda p: film_as(p, wide(LONG, 112, 64), rotation=90), "rejected", "portrait"),
    "landscape_turned.mp4": (lambda p: film_as(p, wide(LONG, 64, 112), rotation=90), "kept", ""),
    "letterbox.mp4": (lambda p: film_as(p, barred(30, 0), g="9"), "kept", ""),
    "cover.mp4": (with_cover, "kept", ""),
    "panorama.mp4": (lambda p: film_as(p, wide(LONG, 256, 64)), "kept", ""),
    "sixty.mp4": (lambda p: film_as(p, np.repeat(LONG, 3, axis=0), fps=Fraction(60)), "kept", ""),
    "ntsc.mp4": (lambda p: film_as(p, LONG, fps=NTSC), "kept", ""),
    "slow.mp4": (lambda p: film_as(p, LONG[:8], fps=Fraction(2)), "rejected", "too_few_frames"),
    "late_start.ts": (lambda p: film_as(p, LONG, codec="mpeg2video", start_s=7.0, fps=Fraction(25)), "kept", ""),
    "uneven.mkv": (lambda p: film_as(p, LONG, times_s=[n / 20 + 0.02 * (n % 2) for n in range(90)]), "kept", ""),
    "hole.mkv": (
        lambda p: film_as(p, LONG, times_s=[n / 20 + 3.0 * (n >= 15) for n in range(90)]),
        "partial",
        "gap",
    ),
    "cuts.mp4": (lambda p: film_as(p, scroll(90, cut_every=3)), "partial", "cuts"),
    "slides.mp4": (lambda p: film_as(p, slides()), "rejected", "slideshow"),
    "blurred.mp4": (lambda p: film_as(p, blurred()), "rejected", "blur"),
    "one_frame.mp4": (lambda p: film_as(p, LONG[:1]), "rejected", "too_short"),
    "picture.mp4": (lambda p: raw(p, png()), "rejected", "too_short"),
    "cut_off.mp4": (lambda p: cut_off(film_as(p, LONG), 0.6), "dead_letter", "unreadable"),
    "cut_off.mkv": (lambda p: cut_off(film_as(p, LONG, codec="ffv1", pixels="yuv420p"), 0.7), "kept", ""),
    "rotten.ts": (lambda p: rotten(film_as(p, LONG, codec="mpeg2video", fps=Fraction(25))), "rejected", "corrupt"),
    "sound.mp4": (sound, "dead_letter", "no_video"),
    "sound_with_cover.mp4": (lambda p: sound(p, cover=png()), "dead_letter", "no_video"),
    "text.mp4": (lambda p: raw(p, b"hello\n" * 500), "dead_letter", "unreadable"),
    "page.mp4": (lambda p: raw(p, b"<!DOCTYPE html><html>404</html>"), "dead_letter", "unreadable"),
    "empty.mp4": (lambda p: raw(p, b""), "dead_letter", "unreadable"),
    "zeros.mp4": (lambda p: raw(p, bytes(5000)), "dead_letter", "unreadable"),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_every_awkward_file_has_its_outcome_and_reason(tmp_path, name):
    make, outcome, reason = AWKWARD[name]
    make(tmp_path / name)
    job = {"path": str(tmp_path / name), "verdict": False, "peek": False, "have": []}
    rows = []
    result = curate_video(job, settings(tmp_path, tmp_path), "x", rows.append)
    assert (result["outcome"], result["reason"]) == (outcome, reason), result["detail"]
    assert bool(rows) == (outcome in ("kept", "partial"))


def sampled(path, size=64, **changes):
    values = {"fps": 10, "width_px": size, "height_px": size, "aspect": "pad"}
    sampler = Sampler(path, **{**values, **changes})
    return sampler, list(sampler.slots())


def number_of(picture):
    """Which frame of `LONG` a picture is."""
    return int(np.argmin([np.abs(picture.astype(int) - f).mean() for f in LONG[:32]]))


@pytest.mark.parametrize(
    ("fps", "shown"),
    [(20, [0, 2, 4, 6]), (30, [0, 3, 6, 9]), (60, [0, 6, 12, 18]), (5, [0, 0, 1, 1]), (25, [0, 2, 5, 7])],
)
def test_a_slot_shows_the_last_frame_that_began_by_then(tmp_path, fps, shown):
    path = film_as(tmp_path / "v.mkv", LONG, codec="ffv1", pixels="bgr0", fps=Fraction(fps))
    _, slots = sampled(path)
    assert [number_of(s.frame) for s in slots[: len(shown)]] == shown
    assert [s.held for s in slots[:4]] == [
        i > 0 and a == b for i, (a, b) in enumerate(zip(shown, [-1, *shown], strict=False))
    ]


@given(steps=st.lists(st.integers(1, 400), min_size=2, max_size=30))
@examples(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_uneven_times_are_sampled_with_hold(tmp_path, steps):
    times = np.cumsum([0, *steps]) / 1000
    frames = np.stack([np.full((16, 16, 3), 7 * n, np.uint8) for n in range(len(times))])
    path = film_as(tmp_path / "v.mkv", frames, codec="ffv1", pixels="bgr0", times_s=list(times))
    _, slots = sampled(path, 16)
    wanted = [int(np.searchsorted(times, s.index / 10 + 1.001e-3, side="right") - 1) for s in slots]
    assert [round(s.frame.mean() / 7) for s in slots] == wanted
    assert len(slots) >= int(times[-1] * 10)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_the_display_matrix_is_obeyed(tmp_path, rotation):
    tall = wide(scroll(10), 96, 64)
    path = film_as(tmp_path / "v.mp4", tall, rotation=rotation, crf="1")
    _, slots = sampled(path, width_px=64 if rotation != 180 else 96, height_px=96 if rotation != 180 else 64)
    turned = np.rot90(tall[0], rotation // 90)
    assert turned.shape == slots[0].frame.shape
    errors = [np.abs(slots[0].frame.astype(int) - np.rot90(turned, 2 * k)).mean() for k in range(2)]
    assert errors[0] < 12 < errors[1]


def test_other_shapes_are_padded_cropped_or_stretched(tmp_path):
    path = film_as(tmp_path / "v.mp4", np.full((10, 64, 128, 3), 200, np.uint8))
    lit = {a: (sampled(path, aspect=a)[1][0].frame > 100).all(axis=2).mean() for a in ("pad", "crop", "stretch")}
    assert lit == {"pad": pytest.approx(0.5, abs=0.04), "crop": 1.0, "stretch": 1.0}


@pytest.mark.parametrize(
    ("rows", "columns", "found"),
    [(30, 0, (30, 0)), (0, 20, (0, 20)), (16, 24, (16, 24)), (0, 0, (0, 0)), (1, 1, (0, 0)), (55, 0, (0, 0))],
)
def test_bars_of_a_whole_video_are_cut_off(tmp_path, rows, columns, found):
    path = film_as(tmp_path / "v.mp4", barred(rows, columns), g="9", crf="10")
    bars = find_bars(path)
    assert bars == pytest.approx(found, abs=1)  # the codec smears an edge
    sampler, slots = sampled(path, 64, aspect="stretch", bars_px=bars)
    if found != (0, 0):
        assert np.abs(slots[10].frame.astype(int) - LONG[20]).mean() < 25
        assert sampler.shape == pytest.approx((120 - 2 * columns) / (120 - 2 * rows), rel=0.05)


def test_what_is_dark_for_a_while_or_on_one_side_is_no_bar(tmp_path):
    assert find_bars(film_as(tmp_path / "still.mp4", barred(30, 0)[:1])) == (0, 0)  # one picture is not enough
    one_side = barred(0, 0)
    one_side[:, :30] = 0
    assert find_bars(film_as(tmp_path / "one.mp4", one_side, g="9")) == (0, 0)
    a_while = np.concatenate([barred(30, 0)[:45], barred(0, 0)[:45]])
    assert find_bars(film_as(tmp_path / "while.mp4", a_while, g="9")) == (0, 0)
    assert find_bars(film_as(tmp_path / "dark.mp4", np.zeros((90, 64, 64, 3), np.uint8), g="9")) == (0, 0)


@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_fit_keeps_the_centre(height, width):
    out = fit(np.full((3, height, width), 9, np.uint8), 20, 20)
    assert out.shape == (3, 20, 20)
    assert (out == 9).sum() == 3 * min(height, 20) * min(width, 20)
    assert (out[:, 9, 9] == 9).all()
    outside = out[:, -1, -1].tolist()
    assert outside == ([9] * 3 if min(height, width) >= 20 else [16, 128, 128])  # black


def test_cuts_are_found_at_the_source_rate_and_scrolling_is_none(tmp_path):
    frames = np.concatenate([scroll(40, seed=1), scroll(33, seed=2), scroll(27, seed=3)])
    sampler, _ = sampled(film(tmp_path, "v", frames, fps=30))  # no clip begins on the way, so all cuts are there
    assert sampler.tally.cuts_s == pytest.approx([40 / 30, 73 / 30], abs=0.002)
    sampler, _ = sampled(film(tmp_path, "fast", scroll(100, speed=8), fps=30))
    assert sampler.tally.cuts_s == []


def test_deep_pictures_give_the_same_brightness():
    deep = av.VideoFrame.from_ndarray(LONG[0], format="rgb24").reformat(format="yuv420p10le")
    plain = av.VideoFrame.from_ndarray(LONG[0], format="rgb24").reformat(format="yuv420p")
    assert np.abs(luma_grid(deep).astype(int) - luma_grid(plain)).max() <= 1
    assert not CutDetector().seen(plain)


def test_damage_is_counted(tmp_path):
    path = film_as(tmp_path / "v.ts", LONG, codec="mpeg2video", fps=Fraction(25))
    sampler, whole = sampled(path)
    assert sampler.tally.corrupt == 0
    rotten(path)
    sampler, _ = sampled(path)
    assert sampler.tally.corrupt > 0
    assert whole
