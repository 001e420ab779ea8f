"""One self-contained HTML page about a curation: what was kept, what was not, why, and what it looked like.

    lampworks report platformers

Written at the end of every curation that changes a dataset, to `reports/<dataset>@<version>.html` of the home.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.config import Home, digest, to_dict
from pipelines import page
from pipelines.config import FilterConfig
from pipelines.cutter import THUMBS, thumb
from pipelines.figures import histogram
from pipelines.filters import ORDER
from pipelines.revise import judged_by
from pipelines.shards import KEPT, Dataset
from pipelines.tables import placed
from pipelines.video import decode_clip, strip

log = logging.getLogger(__name__)

SHOTS = 12
"""Pictures of each reason."""
LONGEST_TABLE = 20
SIGNALS = {
    "static_share": ("share of still frames", "max_static_share"),
    "black_share": ("share of blank frames", "max_black_share"),
    "blur": ("sharpness (variance of the Laplacian)", "min_blur"),
    "held_share": ("share of frames held", "max_held_share"),
    "corrupt_share": ("share of damaged frames", "max_corrupt_share"),
    "motion": ("motion (mean change in levels)", ""),
    "contrast": ("contrast of luma", ""),
    "letterbox": ("share of the picture in bars", ""),
    "quality": ("quality, by the classifier", "min_quality"),
    "copied_share": ("share that better copies show", "max_copied_share"),
}
"""Signal -> what it is, and the threshold on it."""
_COLUMNS = ("uri", "video_id", "outcome", "reason", "detail", "duration_s", "seconds", "uploader", "title", "preview")


def report(home: Home, dataset: Dataset) -> Path:
    """Writes the page of a dataset at a version, if it is not there yet or was judged by other limits."""
    path = home.reports / f"{dataset.name}@{dataset.version}.html"
    filters = judged_by(dataset.folder)
    footer = f"Judged by limits {digest(to_dict(filters))[:12]}. This file is complete: it loads nothing."
    if path.exists() and footer in path.read_text(encoding="utf-8"):
        return path
    ledger = dataset.video_table([*_COLUMNS, "windows"])
    videos, windows = ledger.select(_COLUMNS), _windows(ledger)
    sections = [
        ("kept", "What was kept", _kept(videos, windows)),
        ("reasons", "Why the rest was not", _reasons(dataset, videos, windows)),
        ("signals", "Signals and their limits", _signals(windows, filters)),
        ("uploaders", "Uploaders", _uploaders(videos, windows)),
        ("cost", "Slowest files", _slowest(videos)),
    ]
    header = f'<p class="kicker">Curation report</p><h1>{escape(dataset.reference)}</h1>'
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(page.document(dataset.reference, header, sections, footer), encoding="utf-8")
    draft.replace(path)
    log.info("report | %s | %s", dataset.reference, path)
    return path


def _windows(ledger: pa.Table) -> pa.Table:
    """Every window of every video, with the number of its video; pictures stay where they are until they are shown."""
    lists = ledger["windows"].combine_chunks()
    flat = lists.flatten()
    names = ["start_s", "clip_id", "reason", "preview", "copy_of", *SIGNALS]
    columns = {name: flat.field(name) for name in names}
    parents = np.repeat(np.arange(len(lists)), lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
    return pa.table({**columns, "video": pa.array(parents)})


def _counts(column: pa.ChunkedArray) -> list[tuple[str, int]]:
    return Counter(value or "kept" for value in column.to_pylist()).most_common()


def _kept(videos: pa.Table, windows: pa.Table) -> str:
    hours = sum(videos["duration_s"].drop_null().to_pylist()) / 3600
    kept = windows["reason"].to_pylist().count("")
    said = (
        f"{videos.num_rows} videos, {hours:.2f} hours of them decoded or known; {kept} of {windows.num_rows} clips "
        "that were looked at are in the dataset."
    )
    return (
        page.lead(said)
        + "<h3>Videos</h3>"
        + page.bars(_counts(videos["outcome"]))
        + "<h3>Clips</h3>"
        + page.bars(_counts(windows["reason"]) or [("none", 0)])
    )


# -- why not -----------------------------------------------------------------------------------------------------


def _reasons(dataset: Dataset, videos: pa.Table, windows: pa.Table) -> str:
    """A contact sheet for each reason, of videos that gave nothing and of clips that were left out."""
    refused = videos.filter(~pc.field("outcome").isin(list(KEPT)))
    names = [name for name, _ in _counts(refused["reason"])]
    parts = [page.table(("reason", "outcome", "videos"), _reason_rows(refused))]
    for name in names:
        group = refused.filter(pc.field("reason") == name)
        shots = [_video_shot(row) for row in _spread(group)]
        parts.append(page.sheet(f"Videos: {name}", shots, SHOTS, group.num_rows))
    for name in ORDER:
        group = windows.filter(pc.field("reason") == name)
        titles = videos["video_id"]
        shots = [_clip_shot(dataset, row, titles[row["video"]].as_py()) for row in _spread(group)]
        parts.append(page.sheet(f"Clips: {name}", shots, SHOTS, group.num_rows))
    return "".join(parts)


def _reason_rows(refused: pa.Table) -> list[tuple[str, str, str]]:
    pairs = zip(refused["reason"].to_pylist(), refused["outcome"].to_pylist(), strict=True)
    return [(reason or "", outcome.replace("_", " "), str(n)) for (reason, outcome), n in Counter(pairs).most_common()]


def _spread(table: pa.Table) -> list[dict[str, Any]]:
    """A few rows, evenly spread."""
    count = table.num_rows
    chosen = np.linspace(0, count - 1, min(count, SHOTS)).round().astype(np.int64)
    return table.take(pa.array(chosen)).to_pylist()


def _video_shot(row: dict[str, Any]) -> page.Shot:
    return page.Shot(row["preview"], row["title"] or row["video_id"], (row["detail"] or "")[:140])


def _clip_shot(dataset: Dataset, window: dict[str, Any], video: str) -> page.Shot:
    """A clip's strip from the ledger; of those that were stored first and refused later, from the clip itself."""
    jpeg = window["preview"] or _stored_strip(dataset, window["clip_id"])
    measured = {"quality": window["quality"], "copied": window["copied_share"]}
    said = [f"from {window['start_s']:.0f} s", *(f"{k} {v:.2f}" for k, v in measured.items() if v is not None)]
    return page.Shot(jpeg, video, ", ".join(said) + (f" by {window['copy_of']}" if window["copy_of"] else ""))


def _stored_strip(dataset: Dataset, clip_id: str | None) -> bytes:
    for path in dataset.clip_files() if clip_id else ():
        found = placed(path, ["clip_id"]).filter(pc.field("clip_id") == clip_id)
        if found.num_rows:
            frames = decode_clip(dataset.read_clips(found)[0])
            return strip([thumb(frame) for frame in frames[:: max(1, len(frames) // THUMBS)][:THUMBS]])
    return b""


# -- numbers -----------------------------------------------------------------------------------------------------


def _signals(windows: pa.Table, filters: FilterConfig) -> str:
    """A histogram of each signal over every clip that was looked at, with its limit."""
    charts: list[str] = []
    for name, (label, threshold) in SIGNALS.items():
        values = windows[name].drop_null().to_pylist()
        if values:
            limit = getattr(filters, threshold) if threshold else None
            charts.append(page.figure(histogram(values, label=label, limit=limit)))
    return page.lead("Over all clips that were looked at; the red line is the limit they were judged by.") + page.cards(
        charts, "small"
    )


def _uploaders(videos: pa.Table, windows: pa.Table) -> str:
    names = [name or "unknown" for name in videos["uploader"].to_pylist()]
    of_clip = [names[video] for video in windows["video"].to_pylist()]
    seen = Counter(of_clip)
    kept = Counter(name for name, reason in zip(of_clip, windows["reason"].to_pylist(), strict=True) if not reason)
    found = Counter(names)
    rows = [
        (name, str(count), str(seen[name]), str(kept[name]), f"{kept[name] / seen[name]:.0%}" if seen[name] else "")
        for name, count in sorted(found.items(), key=lambda item: (-seen[item[0]], item[0]))
    ]
    return _table(("uploader", "videos", "clips looked at", "clips kept", "kept"), rows)


def _slowest(videos: pa.Table) -> str:
    rows = [row for row in videos.select(["uri", "seconds", "duration_s", "outcome"]).to_pylist() if row["seconds"]]
    rows.sort(key=lambda row: -row["seconds"])
    said = [
        (row["uri"], f"{row['seconds']:.1f}", f"{row['duration_s'] or 0:.0f}", row["outcome"].replace("_", " "))
        for row in rows
    ]
    return _table(("file", "CPU seconds", "seconds of video", "outcome"), said)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    more = page.note(f"and {len(rows) - LONGEST_TABLE} more") if len(rows) > LONGEST_TABLE else ""
    return page.table(head, rows[:LONGEST_TABLE]) + more
