"""Pictures and plots of evaluations and reports: contact sheets as PNG bytes, charts as standalone SVG text.

Charts take their colours from CSS variables (`--ink`, `--muted`, `--line`, `--s0` ...) and fall back to fixed ones, so
the same text is a file on its own and follows the light or dark theme of a page that it is placed in.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
"""(T, H, W, 3) RGB."""

SIZE, SMALL = (440, 250), (340, 190)
"""Width and height of charts in user units; text is 12 units high in both."""
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 40
LEGEND = 22
FALLBACK = ("#c26a00", "#2b6cb0", "#7a7f87", "#2f855a", "#9b2c6f")
MOST_POINTS = 240


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """Lower and upper bound of an interval, drawn as a shade."""
    tone: int = 0
    """Which of the palette's colours."""
    dashed: bool = False


def enlarge(frames: Frames, least_px: int = 96) -> Frames:
    """Frames (..., H, W, 3) repeated pixel by pixel until their shorter side has at least `least_px`."""
    factor = max(1, math.ceil(least_px / min(frames.shape[-3:-1])))
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def strip(frames: Frames, gap_px: int = 0) -> Frames:
    """Frames side by side as one picture (1 frame is a strip too)."""
    padded = np.pad(frames, ((0, 0), (0, 0), (0, gap_px), (0, 0)), constant_values=255)
    picture = np.concatenate(list(padded), axis=1)
    return picture[:, : picture.shape[1] - gap_px]


def sheet(rows: Sequence[Frames], gap_px: int = 3, least_px: int = 96) -> Frames:
    """A contact sheet (H, W, 3): one strip a row, enlarged, all rows of one length."""
    strips = [strip(enlarge(row, least_px), gap_px) for row in rows]
    wide = max(s.shape[1] for s in strips)
    even = [np.pad(s, ((0, gap_px), (0, wide - s.shape[1]), (0, 0)), constant_values=255) for s in strips]
    return np.concatenate(even, axis=0)[:-gap_px]


def png(picture: Frames) -> bytes:
    """One RGB picture (H, W, 3) as a PNG file."""
    done, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    if not done:
        raise RuntimeError(f"OpenCV could not write a PNG of shape {picture.shape}")
    return data.tobytes()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """A file's bytes as a URI that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    zero: bool = False,
    whole: bool = False,
    size: tuple[int, int] = SIZE,
) -> str:
    """Curves over one pair of axes as SVG text.

    Args:
        lines: the curves; values that aren't finite are left out.
        x_label: what the horizontal axis counts.
        y_label: what the vertical axis measures, with its unit.
        zero: draw a line at zero and have it in range.
        whole: ticks at whole numbers only on the horizontal axis.
        size: `SIZE` or `SMALL`.
    """
    lines = [_thin(line) for line in lines]
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for part in (line.y, *(line.band or ())) for y in part]
    axes = _Axes.around(xs, [*ys, 0.0] if zero else ys, whole, size, TOP + LEGEND * (len(lines) > 1))
    curves = "".join(_curve(axes, line) for line in lines)
    return _svg(y_label or x_label, axes.frame(x_label, y_label, zero) + curves + _legend(lines), size)


def histogram(
    values: Sequence[float], *, label: str, bins: int = 24, size: tuple[int, int] = SMALL, limit: float | None = None
) -> str:
    """How often each value occurs, as SVG text, with a line at a limit if one is given."""
    finite = np.asarray([v for v in values if math.isfinite(v)] or [0.0])
    counts, edges = np.histogram(finite, bins=bins)
    reach = edges.tolist() if limit is None else [*edges.tolist(), limit]
    axes = _Axes.around(reach, [0.0, float(counts.max())], False, size, TOP)
    bars = [
        f'<rect x="{axes.x(a):.1f}" y="{axes.y(n):.1f}" width="{max(axes.x(b) - axes.x(a) - 1, 1):.1f}"'
        f' height="{axes.y(0) - axes.y(n):.1f}" fill="{_colour(0)}"><title>{a:.3g} to {b:.3g}: {n}</title></rect>'
        for n, a, b in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
    if limit is not None:
        x, ink = f"{axes.x(limit):.1f}", "var(--bad,#b3261e)"
        bars.append(
            f'<line x1="{x}" x2="{x}" y1="{axes.top}" y2="{axes.bottom}" stroke="{ink}" stroke-width="2" '
            f'stroke-dasharray="5 4"><title>limit {limit:g}</title></line>'
        )
    return _svg(label, axes.frame(label, "", False) + "".join(bars), size)


@dataclass(frozen=True)
class _Axes:
    """The map from values to places in the picture."""

    x0: float
    x1: float
    x_ticks: list[float]
    y_ticks: list[float]
    size: tuple[int, int]
    top: int

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float], whole: bool, size: tuple[int, int], top: int) -> "_Axes":
        """Axes that hold all points, with ticks at round values."""
        xs, ys = [x for x in xs if math.isfinite(x)] or [0.0], [y for y in ys if math.isfinite(y)] or [0.0]
        x0, x1 = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
        x_ticks = [t for t in _ticks(x0, x1, size[0] // 80) if x0 <= t <= x1 and not (whole and t % 1)]
        return cls(x0, x1, x_ticks, _ticks(min(ys), max(ys), size[1] // 55), size, top)

    @property
    def right(self) -> int:
        return self.size[0] - RIGHT

    @property
    def bottom(self) -> int:
        return self.size[1] - BOTTOM

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (self.right - LEFT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.top + (high - value) / (high - low) * (self.bottom - self.top)

    def frame(self, x_label: str, y_label: str, zero: bool) -> str:
        """Grid, ticks and labels."""
        ink, line = "var(--muted,#666)", "var(--line,#ddd)"
        parts = [
            f'<line x1="{LEFT}" x2="{self.right}" y1="{self.y(t):.1f}" y2="{self.y(t):.1f}" stroke="{line}"/>'
            f'<text x="{LEFT - 8}" y="{self.y(t) + 4:.1f}" text-anchor="end" fill="{ink}">{_short(t)}</text>'
            for t in self.y_ticks
        ]
        parts += [
            f'<text x="{self.x(t):.1f}" y="{self.bottom + 18}" text-anchor="middle" fill="{ink}">{_short(t)}</text>'
            for t in self.x_ticks
        ]
        if zero:
            y = f"{self.y(0):.1f}"
            parts.append(f'<line x1="{LEFT}" x2="{self.right}" y1="{y}" y2="{y}" stroke="var(--ink,#222)"/>')
        parts.append(
            f'<text x="{(LEFT + self.right) / 2}" y="{self.size[1] - 5}" text-anchor="middle" fill="{ink}">'
            f"{escape(x_label)}</text>"
            f'<text transform="translate(11 {(self.top + self.bottom) / 2}) rotate(-90)" text-anchor="middle"'
            f' fill="{ink}">{escape(y_label)}</text>'
        )
        return "".join(parts)


def _curve(axes: _Axes, line: Line) -> str:
    """One curve, its interval behind it, a dot on each point when there are few."""
    colour = _colour(line.tone)
    parts: list[str] = []
    if line.band:
        edge = [(x, y) for x, y in zip(line.x, line.band[1], strict=True)]
        edge += [(x, y) for x, y in zip(line.x, line.band[0], strict=True)][::-1]
        places = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in edge)
        parts.append(f'<polygon points="{places}" fill="{colour}" opacity=".18"/>')
    places = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in zip(line.x, line.y, strict=True))
    parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{_dash(line)}/>')
    if len(line.x) <= 24:
        parts += [
            f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3.5" fill="{colour}">'
            f"<title>{escape(line.label)}: {y:.3g} at {x:g}</title></circle>"
            for x, y in zip(line.x, line.y, strict=True)
        ]
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> str:
    """Names of the curves in a row on top, where there are several."""
    lines = [line for line in lines if line.label]
    if len(lines) < 2:
        return ""
    starts = np.cumsum([LEFT, *(40 + 6.4 * len(line.label) for line in lines)]).tolist()
    return "".join(
        f'<line x1="{x:.0f}" x2="{x + 20:.0f}" y1="{TOP}" y2="{TOP}" stroke="{_colour(line.tone)}" stroke-width="3"'
        f'{_dash(line)}/><text x="{x + 26:.0f}" y="{TOP + 4}" fill="var(--ink,#222)">{escape(line.label)}</text>'
        for x, line in zip(starts, lines, strict=False)
    )


def _dash(line: Line) -> str:
    return ' stroke-dasharray="5 4"' if line.dashed else ""


def _svg(title: str, body: str, size: tuple[int, int]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" role="img" font-size="12"'
        f' font-family="system-ui, sans-serif" aria-label="{escape(title)}">{body}</svg>'
    )


def _colour(tone: int) -> str:
    return f"var(--s{tone % len(FALLBACK)},{FALLBACK[tone % len(FALLBACK)]})"


def _thin(line: Line) -> Line:
    """The line without values that aren't finite, and with at most `MOST_POINTS` of them (means of neighbours)."""
    kept = [i for i, y in enumerate(line.y) if math.isfinite(y)]
    if line.band or (len(kept) == len(line.y) and len(kept) <= MOST_POINTS):
        return line
    groups = np.array_split(np.asarray(kept), min(len(kept), MOST_POINTS)) if kept else []
    x = [float(np.mean([line.x[i] for i in group])) for group in groups]
    y = [float(np.mean([line.y[i] for i in group])) for group in groups]
    return Line(label=line.label, x=x, y=y, tone=line.tone, dashed=line.dashed)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values that enclose [low, high]."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _short(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}"
