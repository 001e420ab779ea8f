"""Duplicates: one of each is kept, which one is deterministic, and nothing is rewritten: the ledger is the keep list.

Byte-identical files never get this far (`manifest`). Here are files that show the same pictures: bit for bit
(`mark_same_frames`), or re-encoded, scaled, mirrored and shifted in time (`find_copies`). The latter are looked for by
hashes of pictures, and believed only when what moves in one clip moves in the other: a single-screen game looks the
same in every video of it. What was compared is kept in `pairs/`, so no pair is decoded twice and the verdict
(`copied`) is a function of the ledger and the pairs alone, whatever is added, judged again or forgotten.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pyarrow as pa
import ray.data

from infra.cluster import connect
from infra.config import ClusterConfig, digest
from pipelines import buckets
from pipelines.filters import CHANGED_LEVELS, MIRRORED
from pipelines.manifest import Plan
from pipelines.shards import KEPT, Writer, open_ledger
from pipelines.tables import delta_table, parquet, placed, table_files, write_shard
from pipelines.video import decode_clip

log = logging.getLogger(__name__)

PAIRS = "pairs"
PAIR_SCHEMA = pa.schema(
    [
        ("a", pa.string()),
        ("b", pa.string()),
        ("mirrored", pa.bool_()),
        ("offset", pa.int32()),
        ("frames", pa.int32()),
        ("agreement", pa.float32()),
    ]
)
"""Clips a < b; frame t of a is frame t + offset of b; clips have `frames` frames; agreement is -1 to 1."""
BANDS, BAND_BITS = 3, 21
WITHIN_FILE = (1 << 40) - 1
MOST_IN_BAND = 64
"""A band that more clips share says nothing (a black screen, a menu); copies share rarer ones too."""
LEAST_BANDS = 2
NEAR_BITS, LEAST_NEAR = 8, 8
"""Pairs are decoded when so many pictures, at one offset in time, differ in at most so many bits."""
BUCKET_ROWS, PAIRS_HERE = 2_000_000, 128
"""Where all bands (of about 4,000 clips) fit one bucket, or so few pairs are left, starting tasks would take longer."""
GRID, LAG = (40, 22), 5
"""Motion is looked at on so many points across and down, from each frame to the fifth after it."""
LEAST_MOVING = 30
"""Frames of an overlap in which either clip moves; fewer prove nothing (half a clip, where clips are short)."""
AGREEMENT = 0.6
"""Least mean correlation of motion: copies reach 0.85 to 1.0, cropped ones 0.1 to 0.9, other clips up to 0.45."""


# -- the same frames ---------------------------------------------------------------------------------------------


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


# -- the verdict -------------------------------------------------------------------------------------------------


def copied(clips: Mapping[str, tuple[Any, ...]], pairs: Iterable[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """How much of each clip better copies show, and the one that shows most of it.

    Args:
        clips: the rank (lower is better, all different) of every clip that passes on its own.
        pairs: rows of `PAIR_SCHEMA`.
    Returns:
        clip id -> (share of its frames, clip id), for those with any.
    """
    shown: dict[str, list[tuple[int, str]]] = defaultdict(list)
    frames: dict[str, int] = {}
    for pair in pairs:
        a, b, offset = pair["a"], pair["b"], pair["offset"]
        if pair["agreement"] >= AGREEMENT and a in clips and b in clips:
            if clips[a] < clips[b]:
                shown[b].append((offset, a))
            else:
                shown[a].append((-offset, b))
            frames[a] = frames[b] = pair["frames"]
    return {clip: _covered(frames[clip], parts) for clip, parts in sorted(shown.items())}


def _covered(frames: int, parts: list[tuple[int, str]]) -> tuple[float, str]:
    """The share of a clip that others, lying at offsets, cover together, and the one that covers most."""
    seen = np.zeros(frames, bool)
    for offset, _ in parts:
        seen[max(0, offset) : frames + min(0, offset)] = True
    return float(seen.mean()), min((abs(offset), clip) for offset, clip in parts)[1]


def read_pairs(folder: Path) -> list[dict[str, Any]]:
    """Everything that was ever compared in a dataset's folder, the latest word last."""
    return [row for path in sorted((folder / PAIRS).glob("*.parquet")) for row in parquet(path).read().to_pylist()]


# -- the search --------------------------------------------------------------------------------------------------


def find_copies(folder: Path, cluster: ClusterConfig) -> int:
    """Compares stored clips that may show the same and were not compared before; a killed search is simply run again.

    Args:
        folder: the dataset's.
        cluster: where Ray runs.
    Returns:
        How many pairs were compared.
    """
    table = delta_table(folder / "clips")
    files = table_files(table, folder / "clips") if table else []
    target = folder / PAIRS / f"{digest([f.name for f in files])[:24]}.parquet"
    if not files or target.exists():
        return 0
    known = {(p["a"], p["b"], p["mirrored"]) for p in read_pairs(folder)}
    jobs = [job for job in _candidates(files, cluster) if (job["a"], job["b"], job["mirrored"]) not in known]
    rows = _compared(jobs, cluster)
    write_shard(target, rows, PAIR_SCHEMA)
    same = sum(row["agreement"] >= AGREEMENT for row in rows)
    log.info("curate | %d pairs of clips compared, %d show the same", len(rows), same)
    return len(rows)


def _candidates(files: list[Path], cluster: ClusterConfig) -> list[dict[str, Any]]:
    """Pairs of clips of different videos that share bands of their hashes: {a, b, mirrored, place_a, place_b}."""
    clips = sum(parquet(f).metadata.num_rows for f in files)
    groups = 1 + clips * 2 * BANDS * 80 // BUCKET_ROWS
    rows = [{"number": number, "path": str(path)} for number, path in enumerate(files)]
    parts = [shared_bands(band_rows(_columns(rows), 1))] if groups == 1 else _shared_by_ray(rows, groups, cluster)
    found = (
        pa.concat_tables([pa.table(part) for part in parts])
        .group_by(["place_a", "place_b", "mirrored"])
        .aggregate([("bands", "sum")])
    )
    pairs = [p for p in found.to_pylist() if p["bands_sum"] >= LEAST_BANDS]
    ids = _clip_ids(files, {place for pair in pairs for place in (pair["place_a"], pair["place_b"])})
    return sorted((_ordered(pair, files, ids) for pair in pairs), key=lambda p: (p["a"], p["b"], p["mirrored"]))


def _shared_by_ray(rows: list[dict[str, Any]], groups: int, cluster: ClusterConfig) -> list[dict[str, np.ndarray]]:
    """`shared_bands` of each bucket, over the cluster."""
    with connect(cluster):
        _quietly()
        shared = (
            ray.data.from_items(rows, override_num_blocks=min(len(rows), 1000))
            .map_batches(cast(Any, band_rows), batch_size=1, fn_kwargs={"groups": groups})
            .groupby("bucket", num_partitions=min(groups, 200))
            .map_groups(cast(Any, shared_bands), batch_format="numpy")
        )
        return [cast(dict[str, np.ndarray], part) for part in shared.iter_batches(batch_format="numpy")]


def _quietly() -> None:
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _place(file: int, group: int, row: int) -> int:
    return file << 40 | group << 16 | row


def _clip_ids(files: list[Path], places: set[int]) -> dict[int, str]:
    """The ids of the clips at these places."""
    ids: dict[int, str] = {}
    for number in {place >> 40 for place in places}:
        for row in placed(files[number], ["clip_id"]).to_pylist():
            ids[_place(number, row["row_group"], row["row"])] = row["clip_id"]
    return ids


def _ordered(pair: dict[str, Any], files: list[Path], ids: dict[int, str]) -> dict[str, Any]:
    """A pair's job, the smaller id first."""
    (a, at_a), (b, at_b) = sorted((ids[pair[key]], pair[key]) for key in ("place_a", "place_b"))
    paths = {"path_a": str(files[at_a >> 40]), "path_b": str(files[at_b >> 40])}
    return {"a": a, "b": b, "mirrored": pair["mirrored"], "place_a": at_a, "place_b": at_b, **paths}


def band_rows(batch: dict[str, np.ndarray], groups: int) -> dict[str, np.ndarray]:
    """Ray Data's map over shards: one row for each band of each clip's hashes, and of its mirror image's."""
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for number, path in zip(batch["number"].tolist(), batch["path"].tolist(), strict=True):
        for row in placed(buckets.place(path), ["video_id", "phash"]).to_pylist():
            video = int.from_bytes(hashlib.sha256(row["video_id"].partition("#")[0].encode()).digest()[:7], "big")
            for mirrored in (False, True):
                bands = _bands(np.array(row["phash"] or [], np.int64) ^ (MIRRORED if mirrored else 0))
                parts["band"].append(bands)
                parts["place"].append(np.full(len(bands), _place(number, row["row_group"], row["row"])))
                parts["video"].append(np.full(len(bands), video))
                parts["mirrored"].append(np.full(len(bands), mirrored))
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    return {**whole, "bucket": whole["band"] * 0x9E3779B1 % 2**31 % groups}


def _bands(hashes: np.ndarray) -> np.ndarray:
    """The different bands of hashes (n,), each with its number above its bits."""
    shifts = np.arange(BANDS) * BAND_BITS
    return np.unique((hashes[:, None] >> shifts & (1 << BAND_BITS) - 1) | np.arange(BANDS) << BAND_BITS)


def shared_bands(group: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ray Data's map over a bucket of bands: pairs of clips with the number of bands they share in it."""
    order = np.argsort(group["band"], kind="stable")
    _, starts, sizes = np.unique(group["band"][order], return_index=True, return_counts=True)
    order = order[np.repeat(sizes <= MOST_IN_BAND, sizes)]
    band, place, video, mirrored = (group[name][order] for name in ("band", "place", "video", "mirrored"))
    pairs = [np.empty((0, 3), np.int64)]
    for step in range(1, MOST_IN_BAND):
        same = band[step:] == band[:-step]
        if not same.any():
            break
        i = np.flatnonzero(same & (video[step:] != video[:-step]))
        first, second = (np.where(place[i] < place[i + step], *pair) for pair in ((i, i + step), (i + step, i)))
        plain = ~mirrored[first]  # a pair that is mirrored together is the plain pair again
        pairs.append(np.stack([place[first], place[second], mirrored[second]], axis=1)[plain].astype(np.int64))
    unique, counts = np.unique(np.concatenate(pairs), axis=0, return_counts=True)
    return {"place_a": unique[:, 0], "place_b": unique[:, 1], "mirrored": unique[:, 2] > 0, "bands": counts}


# -- the comparison ----------------------------------------------------------------------------------------------


def _compared(jobs: list[dict[str, Any]], cluster: ClusterConfig) -> list[dict[str, Any]]:
    """Each pair's row, over the cluster where there are many."""
    if len(jobs) <= PAIRS_HERE:
        return pa.table(compare(_columns(jobs))).to_pylist() if jobs else []
    blocks = -(-len(jobs) // PAIRS_HERE)
    with connect(cluster):
        _quietly()
        rows = ray.data.from_items(jobs, override_num_blocks=blocks).map_batches(cast(Any, compare), batch_size=64)
        return sorted(rows.take_all(), key=lambda row: (row["a"], row["b"], row["mirrored"]))


def compare(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ray Data's map over pairs of clips: rows of `PAIR_SCHEMA`. Pairs with unlike hashes are not decoded."""
    hashes, motion = lru_cache(32)(_hashes), lru_cache(64)(_motion)
    out: dict[str, list[Any]] = defaultdict(list)
    for n in range(len(batch["a"])):
        a, b = ((str(batch[f"path_{x}"][n]), int(batch[f"place_{x}"][n]) & WITHIN_FILE) for x in "ab")
        mirrored = bool(batch["mirrored"][n])
        (of_a, frames), (of_b, _) = (hashes(path)[place] for path, place in (a, b))
        offset, agreement = 0, -1.0
        if alike(of_a, of_b ^ (MIRRORED if mirrored else 0)):
            offset, agreement = match(motion(*a), motion(*b)[..., ::-1] if mirrored else motion(*b))
        row = (batch["a"][n], batch["b"][n], mirrored, offset, frames, agreement)
        for name, value in zip(PAIR_SCHEMA.names, row, strict=True):
            out[name].append(value)
    return {name: np.array(values) for name, values in out.items()}


def _hashes(path: str) -> dict[int, tuple[np.ndarray, int]]:
    """By place within the file, the hashes and number of frames of its clips."""
    rows = placed(buckets.place(path), ["phash", "n_frames"]).to_pylist()
    return {
        _place(0, row["row_group"], row["row"]): (np.array(row["phash"] or [], np.int64), row["n_frames"])
        for row in rows
    }


def _motion(path: str, place: int) -> np.ndarray:
    group = parquet(buckets.place(path)).read_row_group(place >> 16, columns=["video"])
    return motion_of(decode_clip(group["video"][place & 0xFFFF].as_py()))


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether enough pictures of two clips are near, at any one offset in time; hashes (n,) and (m,)."""
    i, j = np.nonzero(np.bitwise_count(a[:, None] ^ b) <= NEAR_BITS)
    return bool(len(i)) and bool(np.bincount(j - i + len(a)).max() >= min(LEAST_NEAR, len(a), len(b)))


def motion_of(frames: np.ndarray) -> np.ndarray:
    """What changes in half a second on a coarse grid; small changes are noise: float32 (T - lag, h, w)."""
    luma = (cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames)
    small = np.stack([cv2.resize(f, GRID, interpolation=cv2.INTER_AREA) for f in luma]).astype(np.float32)
    change = small[LAG:] - small[:-LAG]
    change[np.abs(change) < CHANGED_LEVELS] = 0
    return change


def match(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    """Where in time the motion of two clips agrees best, and how well.

    Args:
        a, b: of `motion_of`, (n, h, w) and (m, h, w).
    Returns:
        offset (a's frame t is b's t + offset), and the mean correlation of those of the overlap's frames in which
        anything moves; 0 where too few do at any offset.
    """
    a, b = (part.reshape(len(part), -1) for part in (a, b))
    sizes = [np.linalg.norm(part, axis=1) for part in (a, b)]
    alike = (a @ b.T) / np.maximum(
        np.outer(*sizes), 1e-6
    )  # each frame counts the same: a cut has no more say than a step
    moves_a, moves_b = (size > 0 for size in sizes)
    least = min(LEAST_MOVING, len(a) // 2, len(b) // 2)
    best = (0.0, 0, 0)
    for offset in range(-len(a) + least, len(b) - least + 1):
        at, count = max(0, -offset), min(len(a) - max(0, -offset), len(b) - max(0, offset))
        moving = int((moves_a[at : at + count] | moves_b[at + offset : at + offset + count]).sum())
        if moving >= max(1, least):
            best = max(best, (round(float(np.trace(alike, offset)) / moving, 3), count, offset))
    return best[2], best[0]
