"""The learned judge of clips: what it learns from, how well it does on videos it never saw, and its scores.

    lampworks label platformers && lampworks train quality --dataset platformers
    lampworks curate videos/ --quality quality@v1 --filters.min-quality 0.5

Labels are 1 to 5 (`label.py`); as in the paper (section 3.1) 5 is good, 1 is bad, and what lies between is left out.
Scores are stored signals: other thresholds decode nothing, and only another classifier scores again.
"""

import json
import logging
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np
import pyarrow as pa

from infra.artifact import resolve
from infra.cluster import connect
from infra.config import Home, UserError, digest
from models.config import QualityConfig
from pipelines import page
from pipelines.buckets import place
from pipelines.config import CurateConfig
from pipelines.feed import Batch, mix
from pipelines.figures import Line, line_chart
from pipelines.label import read_labels
from pipelines.manifest import split_of
from pipelines.shards import Dataset, open_dataset
from pipelines.tables import append, delta_table, parquet, placed, table_files, write_shard
from pipelines.train_config import FeedConfig
from pipelines.video import decode_clip, strip

if TYPE_CHECKING:
    from models.quality import QualityNet

log = logging.getLogger(__name__)

GOOD, BAD = 5, 1
SCORE_SCHEMA = pa.schema([("clip_id", pa.string()), ("quality", pa.float32())])
CLIPS_PER_FILE = 256
AT_ONCE = 16
SAMPLE = 2000
SHOWN = 12


def thumbnails(frames: np.ndarray, model: QualityConfig) -> np.ndarray:
    """What the classifier sees of a clip: uint8 (T, H, W, 3) -> (frames, height_px, width_px, 3), evenly spread."""
    places = np.linspace(0, len(frames) - 1, model.frames).round().astype(int)
    size = (model.width_px, model.height_px)
    return np.stack([cv2.resize(frames[i], size, interpolation=cv2.INTER_AREA) for i in places])


# -- what it learns from -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Labelled clips as a source of training batches (see `feed.Source`)."""

    home: Path
    dataset: str
    """`name@version`"""
    labels: tuple[tuple[str, int], ...]
    """(clip id, 1 for good or 0), of the videos that are learned from."""
    model: QualityConfig
    seed: int
    feed: FeedConfig

    @property
    def frames(self) -> int:
        """Thumbnails of a sample."""
        return self.model.frames

    def open(self) -> "Thumbs":
        """The samples, readable."""
        return Thumbs(self)


class Thumbs:
    """Random access to labelled samples; every pass visits each clip once, in an order drawn from (seed, pass)."""

    def __init__(self, source: Labelled) -> None:
        self.source, self.dataset = source, open_dataset(Home(source.home), source.dataset)
        index = stored(self.dataset)
        places = {clip: n for n, clip in enumerate(index["clip_id"].to_pylist())}
        self.rows = [index.slice(places[clip], 1) for clip, _ in source.labels]
        self.labels = np.array([label for _, label in source.labels], np.float32)
        shares = np.bincount(self.labels.astype(int), minlength=2) / len(self.labels)
        self.weights = (0.5 / shares[self.labels.astype(int)]).astype(np.float32)
        self._seen: OrderedDict[int, np.ndarray] = OrderedDict()
        self._order = lru_cache(2)(self._draw_order)

    def batch(self, first: int, count: int) -> Batch:
        """Samples first..first+count-1: frames uint8 (B,T,H,W,3), half of them mirrored, label, weight, key, sample."""
        samples = range(first, first + count)
        chosen = [int(self._order(s // len(self.rows))[s % len(self.rows)]) for s in samples]
        keys = [mix(self.source.seed, s, 2) for s in samples]
        shown = [self.clip(n)[:, :, ::-1] if key & 1 else self.clip(n) for n, key in zip(chosen, keys, strict=True)]
        return {
            "sample": np.array(samples, np.int64),
            "key": np.array(keys, np.int64),
            "frames": np.stack(shown),
            "label": self.labels[chosen],
            "weight": self.weights[chosen],
        }

    def _draw_order(self, turn: int) -> np.ndarray:
        return np.random.default_rng([self.source.seed, turn]).permutation(len(self.rows))

    def clip(self, number: int) -> np.ndarray:
        """A sample's thumbnails, (T,H,W,3)."""
        if number not in self._seen:
            data = self.dataset.read_clips(self.rows[number])[0]
            self._seen[number] = thumbnails(decode_clip(data), self.source.model)
            while len(self._seen) > max(1, self.source.feed.cache_bytes // self._seen[number].nbytes):
                self._seen.popitem(last=False)
        return self._seen[number]


def stored(dataset: Dataset) -> pa.Table:
    """Where every clip lies, those too that a threshold drops by now: they are what a classifier learns from."""
    columns = ["clip_id", "video_id", "n_frames", "fps"]
    return pa.concat_tables([placed(path, columns) for path in dataset.clip_files()]).sort_by("clip_id")


def labelled(dataset: Dataset, holdout: float) -> dict[str, list[tuple[str, int]]]:
    """The labels to learn from ("train") and to measure on ("test"), by a hash of the video: (clip id, 1 or 0).

    Raises:
        UserError: one of the classes is missing on one of the sides.
    """
    known = {row["clip_id"]: row["video_id"] for row in stored(dataset).select(["clip_id", "video_id"]).to_pylist()}
    sides: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for clip, stars in sorted(read_labels(dataset.folder).items()):
        if clip in known and stars in (GOOD, BAD):
            sides[split_of(known[clip].partition("#")[0], holdout)].append((clip, int(stars == GOOD)))
    for side, rows in sides.items():
        counts = Counter(label for _, label in rows)
        if len(counts) < 2:
            raise UserError(
                f"of {dataset.reference} {counts[1]} clips rated 5 and {counts[0]} rated 1 are for {side}: rate more, "
                f"of more videos, with `lampworks label {dataset.name}`, or change --label-holdout"
            )
    return sides


# -- how well it does --------------------------------------------------------------------------------------------


def curve(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Precision and recall at every score as a threshold (descending), the best of them by F1, and the ROC's area.

    Args:
        scores: (n,), higher is better.
        labels: (n,), 1 for good and 0 for bad; some of each.
    """
    order = np.argsort(-scores, kind="stable")
    hits, kept = np.cumsum(labels[order]), np.arange(1, len(order) + 1)
    last = np.append(np.diff(scores[order]) != 0, True)  # of equal scores all or none are kept
    thresholds, hits, kept = scores[order][last], hits[last], kept[last]
    precision, recall = hits / kept, hits / labels.sum()
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    good, bad = scores[labels == 1], scores[labels == 0]
    area = (good[:, None] > bad).mean() + 0.5 * (good[:, None] == bad).mean()
    best = int(f1.argmax())
    metrics = {"precision": precision[best], "recall": recall[best], "threshold": thresholds[best], "roc_auc": area}
    points = {"threshold": thresholds.tolist(), "precision": precision.tolist(), "recall": recall.tolist()}
    return {"metrics": {name: float(value) for name, value in metrics.items()}, "curve": points}


def examine(source: Labelled, test: list[tuple[str, int]], model: "QualityNet", folder: Path) -> dict[str, Any]:
    """Measures a classifier on labelled clips of videos it never saw; writes numbers, charts and a page.

    Args:
        source: what it learned from.
        test: (clip id, label) of the held-out videos.
        model: the classifier.
        folder: gets measures.json, precision.svg, hours.svg and quality.html.
    """
    dataset = open_dataset(Home(source.home), source.dataset)
    index = stored(dataset)
    seconds = np.divide(index["n_frames"].to_numpy(), index["fps"].to_numpy())
    places = {clip: n for n, clip in enumerate(index["clip_id"].to_pylist())}
    judged = [places[clip] for clip, _ in test]
    sample = np.random.default_rng(0).permutation(len(places))[:SAMPLE].tolist()
    shown: dict[int, tuple[float, bytes]] = {}
    for n in sorted({*judged, *sample}):
        frames = thumbnails(decode_clip(dataset.read_clips(index.slice(n, 1))[0]), source.model)
        shown[n] = (_scores(model, frames[None])[0], strip(list(frames)))
    found = curve(np.array([shown[n][0] for n in judged]), np.array([label for _, label in test]))
    steps = np.linspace(0, 1, 51)
    scores = np.array([shown[n][0] for n in sample])
    hours = [float(seconds.sum() / 3600 * (scores >= step).mean()) for step in steps]
    found |= {"hours": {"threshold": steps.tolist(), "hours": hours}, "sampled_clips": len(sample)}
    found["counts"] = {"learned": len(source.labels), "held_out": len(test), "good": sum(label for _, label in test)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "measures.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    charts = _charts(found)
    for name, chart in charts.items():
        (folder / f"{name}.svg").write_text(chart, encoding="utf-8")
    rated = [(shown[n], label) for n, (_, label) in zip(judged, test, strict=True)]
    (folder / "quality.html").write_text(_page(source, found, charts, rated), encoding="utf-8")
    return found


def _scores(model: "QualityNet", frames: np.ndarray) -> list[float]:
    """Scores of thumbnails (B,T,H,W,3)."""
    import torch

    device = next(model.parameters()).device
    return model.score(torch.from_numpy(np.ascontiguousarray(frames)).to(device)).cpu().tolist()


def _charts(found: dict[str, Any]) -> dict[str, str]:
    points, hours = found["curve"], found["hours"]
    precision = Line(label="precision", x=points["recall"], y=points["precision"])
    left = Line(label="hours", x=hours["threshold"], y=hours["hours"])
    return {
        "precision": line_chart([precision], x_label="recall", y_label="precision", zero=True),
        "hours": line_chart([left], x_label="--filters.min-quality", y_label="hours kept", zero=True),
    }


def _page(
    source: Labelled, found: dict[str, Any], charts: dict[str, str], rated: list[tuple[tuple[float, bytes], int]]
) -> str:
    """The numbers, the curves, and the held-out clips that the classifier is most wrong about."""
    metrics, counts = found["metrics"], found["counts"]
    said = (
        f"Learned from {counts['learned']} rated clips of {source.dataset}, measured on {counts['held_out']} of other "
        f"videos, {counts['good']} of them good. Precision {metrics['precision']:.2f} at recall "
        f"{metrics['recall']:.2f} where a threshold of {metrics['threshold']:.2f} is set; area under the ROC curve "
        f"{metrics['roc_auc']:.2f}. Hours are reckoned from {found['sampled_clips']} clips of the dataset."
    )
    body = page.lead(said) + page.cards((page.figure(chart) for chart in charts.values()), "pair")
    for title, label, sign in (("Good clips with the lowest scores", 1, 1), ("Bad clips with the highest", 0, -1)):
        worst = sorted((shot for shot, kind in rated if kind == label), key=lambda shot: sign * shot[0])
        body += page.sheet(title, [page.Shot(jpeg, f"{score:.2f}", "") for score, jpeg in worst], SHOWN)
    header = f'<p class="kicker">Quality classifier</p><h1>{source.dataset}</h1>'
    return page.document("Quality classifier", header, [("quality", "On videos it never saw", body)], "")


# -- its scores --------------------------------------------------------------------------------------------------


class Scorer:
    """Ray Data's actor: a row that names clips becomes a file of their scores, and a row about that."""

    def __init__(self, folder: str, model: Path, target: str) -> None:
        import torch

        from models.checkpoint import load_model

        self.clips, self.target = place(folder) / "clips", place(target)
        self.model = cast("QualityNet", load_model(model, "cuda" if torch.cuda.is_available() else "cpu", "quality"))

    def __call__(self, unit: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A score file for the unit's clips; an existing one is taken as it is, for it was renamed when whole."""
        unit_id, clips = str(unit["unit_id"][0]), json.loads(str(unit["clips"][0]))
        path = self.target / f"{unit_id}.parquet"
        if not path.exists():
            rows: list[dict[str, Any]] = []
            for start in range(0, len(clips), AT_ONCE):
                part = clips[start : start + AT_ONCE]
                scores = _scores(self.model, np.stack([self._thumbnails(clip) for clip in part]))
                rows += [{"clip_id": clip["clip_id"], "quality": s} for clip, s in zip(part, scores, strict=True)]
            write_shard(path, rows, SCORE_SCHEMA)
        return {"unit_id": np.array([unit_id]), "clips": np.array([len(clips)])}

    def _thumbnails(self, clip: dict[str, Any]) -> np.ndarray:
        group = parquet(self.clips / clip["file"]).read_row_group(clip["row_group"], columns=["video"])
        return thumbnails(decode_clip(group["video"][clip["row"]].as_py()), self.model.cfg)


def score(folder: Path, config: CurateConfig) -> dict[str, float]:
    """Scores the stored clips of a dataset that this classifier has not scored yet; killed, it is simply run again.

    Returns:
        Quality by clip id, 0 to 1.

    Raises:
        UserError: there is no such classifier.
    """
    artifact = resolve(Home(config.home), config.quality or "quality", kind="quality")
    target = folder / f"quality-{artifact.reference.replace('@', '-')}"
    clips = delta_table(folder / "clips")
    known = _read_scores(target)
    files = table_files(clips, folder / "clips") if clips else []
    missing = [row for file in files for row in placed(file, ["clip_id"]).to_pylist() if row["clip_id"] not in known]
    units = [
        _unit(artifact.fingerprint, missing[n : n + CLIPS_PER_FILE]) for n in range(0, len(missing), CLIPS_PER_FILE)
    ]
    if not units:
        return known
    log.info("quality | %s scores %d clips", artifact.reference, len(missing))
    facts = {"classifier": artifact.reference, "fingerprint": artifact.fingerprint}
    began, done = time.monotonic(), 0
    with connect(config.cluster):
        for row in _scored(units, config, (str(folder), artifact.path, str(target))):
            file = target / f"{row['unit_id']}.parquet"
            append(target, SCORE_SCHEMA, delta_table(target), [(row["unit_id"], file)], facts)
            done += row["clips"]
            log.info("quality | %d/%d clips | %.1f clips/s", done, len(missing), done / (time.monotonic() - began))
    return _read_scores(target)


def _unit(fingerprint: str, clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Clips in files; a file's name follows from its clips, so a file left by a killed run is found again."""
    return {"unit_id": digest([fingerprint, [c["clip_id"] for c in clips]])[:24], "clips": json.dumps(clips)}


def _scored(units: list[dict[str, Any]], config: CurateConfig, arguments: tuple[Any, ...]) -> Any:
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    cores = int(ray.cluster_resources().get("CPU", 1))
    return (
        ray.data.from_items(units, override_num_blocks=len(units))
        .map_batches(
            Scorer,
            fn_constructor_args=arguments,
            batch_size=1,
            num_cpus=1,
            num_gpus=config.quality_gpus,
            compute=ray.data.ActorPoolStrategy(size=min(config.workers or cores, len(units))),
        )
        .iter_rows()
    )


def _read_scores(root: Path) -> dict[str, float]:
    table = delta_table(root)
    rows = (row for file in (table_files(table, root) if table else []) for row in parquet(file).read().to_pylist())
    return {row["clip_id"]: row["quality"] for row in rows}
