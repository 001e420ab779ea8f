"""What a curation would do, and why it did what it did: `--dry-run` and `--explain VIDEO`.

lampworks curate --source videos/ --dry-run
lampworks curate --source videos/ --explain dQw4w9WgXcQ
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from infra.config import UserError, to_dict
from pipelines.buckets import file_name
from pipelines.config import CurateConfig, FilterConfig
from pipelines.fetch import FetchError, fetched
from pipelines.filters import Rules, decisions
from pipelines.manifest import new_rows, scan
from pipelines.shards import dataset_folder, open_ledger
from pipelines.sources import Source, source_of
from pipelines.tables import delta_table
from pipelines.unit import Child

SAMPLE, SAMPLE_S = 3, 300.0


def estimate(config: CurateConfig) -> str:
    """The resolved settings, the work by outcome of the rules, and its cost from a few decoded videos; writes nothing.

    Raises:
        UserError: no such source, or nothing in it.
    """
    folder = dataset_folder(config.home, config.name, config.target)
    rows = new_rows(folder, source_of(config), config)
    wanted = [row for row in rows if not row["verdict"]]
    seconds = sum(row["duration_s"] or 0.0 for row in wanted)
    refused = Counter(row["reason"] for row in rows if row["verdict"])
    lines = [
        json.dumps(to_dict(config), indent=1, ensure_ascii=False),
        f"new videos   {len(rows)} ({sum(row['size_bytes'] or 0 for row in rows) / 2**30:.2f} GiB)",
        f"refused      {sum(refused.values())} by metadata: {_listed(refused)}",
        f"to decode    {len(wanted)} videos, {seconds / 3600:.2f} hours, {len({r['unit_id'] for r in wanted})} units",
    ]
    return "\n".join([*lines, *_cost(config, wanted, seconds)])


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common()) or "none"


def _cost(config: CurateConfig, wanted: list[dict[str, Any]], seconds: float) -> Iterable[str]:
    sample = [wanted[round(i * (len(wanted) - 1) / max(1, SAMPLE - 1))] for i in range(min(SAMPLE, len(wanted)))]
    child = Child(to_dict(config), "")
    last = max(1, round(SAMPLE_S * config.fps / config.clip_frames)) * config.clip_frames - 1
    plain: dict[str, Any] = {"verdict": False, "peek": False, "have": list[str](), "last_slot": last}
    done: list[dict[str, Any]] = []
    for row in sample:
        with contextlib.suppress(FetchError), fetched(row["path"], row["size_bytes"], config.fetch) as got:
            result = child.run({"path": str(got.path), **plain}, config.timeout_s)
            done.append({**result, "rows": [len(row["video"]) for row in result["rows"]]})
    child.stop()
    shown = sum(result.get("duration_s", 0.0) for result in done)
    if not shown:
        return [f"cost         unknown: none of {len(sample)} sampled videos could be decoded"]
    clips = [size_bytes for result in done for size_bytes in result["rows"]]
    scale = seconds / shown
    spent = sum(result["seconds"] for result in done)
    return [
        f"sampled      {len(sample)} videos: {shown / spent:.0f}x real time on one core, {len(clips)} clips kept",
        f"estimate     {spent * scale / 3600:.2f} core-hours, {len(clips) * scale:.0f} clips, "
        f"{sum(clips) * scale / 2**30:.2f} GiB",
    ]


def explain(config: CurateConfig, video: str) -> str:
    """Every rule's verdict on one video, and what the ledger says of it and its clips.

    Raises:
        UserError: the source has no such video.
    """
    source = find_video(scan(source_of(config)), video)
    lines = [f"{source.uri} ({source.name})", *rule_lines(config, source)]
    return "\n".join([*lines, *history(config, source.uri)])


def rule_lines(config: CurateConfig, source: Source) -> list[str]:
    """Every rule's verdict on a video's metadata."""
    return [
        f"  rule {name:13} {f'REFUSED {verdict.reason}: {verdict.detail}' if verdict else 'passed'}"
        for name, verdict in Rules(config.rules).explain(source.metadata)
    ]


def find_video(sources: list[Source], video: str) -> Source:
    """The video of a source that an id, a file name or a path means.

    Raises:
        UserError: there is none.
    """
    for source in sources:
        if video in (source.name, source.uri, file_name(source.location), source.location):
            return source
    raise UserError(f"no video {video!r} among {len(sources)} in the source: give its id or file name")


def history(config: CurateConfig, uri: str) -> list[str]:
    """What the ledger says of a video and its clips."""
    folder = dataset_folder(config.home, config.name, config.target)
    if delta_table(folder / "videos") is None:
        return ["not curated yet"]
    columns = ["uri", "outcome", "stage", "reason", "detail", "windows"]
    parts = [line for row in open_ledger(folder, columns) if row["uri"] == uri for line in _story(row, config)]
    return parts or ["not curated yet"]


def _story(row: dict[str, Any], config: CurateConfig) -> list[str]:
    lines = [f"{row['outcome']} | stage {row['stage']} | {row['reason'] or 'no objection'} | {row['detail']}"]
    return [*lines, *(window_line(window, config.filters) for window in row["windows"] or ())]


def window_line(window: dict[str, Any], filters: FilterConfig) -> str:
    """One window of a ledger row: what became of it, and each signal beside its limit."""
    tests = (f"{d.reason} {d.value:.3g}{'!' if d.refused else ''} ({d.limit:g})" for d in decisions(window, filters))
    copy = f" as {window['copy_of']}" if window.get("copy_of") else ""
    return f"  {window['start_s']:7.1f} s {window['reason'] or 'kept':15} {', '.join(tests)}{copy}"
