"""Duplicates: one of each is kept, which one is deterministic, and nothing is rewritten: the ledger is the keep list.

Byte-identical files never get this far (`manifest`). Here are files that show the same pictures.
"""

import logging
from collections import defaultdict
from typing import Any

from pipelines.manifest import Plan
from pipelines.shards import KEPT, Writer, open_ledger

log = logging.getLogger(__name__)


def mark_same_frames(writer: Writer, plan: Plan) -> int:
    """Videos whose sampled frames are equal bit for bit, in another container or under another name.

    The first in the order of the plans stays, so a later run never takes back what an earlier one kept.

    Returns:
        How many became duplicates.
    """
    order = {video_id: place for place, video_id in enumerate(plan.video_ids)}
    groups: dict[str, list[str]] = defaultdict(list)
    for row in open_ledger(writer.folder, ["video_id", "outcome", "frames_digest"]):
        if row["outcome"] in KEPT and row["frames_digest"]:
            groups[row["frames_digest"]].append(row["video_id"])
    changes: dict[str, dict[str, Any]] = {}
    for group in groups.values():
        first, *copies = sorted(group, key=lambda video_id: order[video_id])
        for copy in copies:
            changes[copy] = {
                "outcome": "duplicate",
                "stage": "copies",
                "reason": "same_frames",
                "detail": f"as {first}",
            }
    if changes:
        writer.amend(changes, "same frames")
        log.info("curate | %d videos show the frames of another", len(changes))
    return len(changes)
