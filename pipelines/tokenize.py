"""Clips to tokens: `lampworks tokenize` runs the tokenizer over a dataset and keeps the tokens beside the clips.

Tokens are uint16, (n_frames, N) per clip, in a Delta table `datasets/<name>/tokens-<tokenizer>`. Encoders without
temporal context give the tokens that any window of the clip would give. A temporal encoder runs over the whole clip
in one causal pass, its attention sliding over its own window: as in play, a frame's tokens know the frames before it,
so the first frames of a training window have been encoded with more history than they would have alone.
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from infra.artifact import Artifact, resolve
from infra.cluster import connect
from infra.config import Home, UserError, digest
from pipelines.config import TokenizeConfig
from pipelines.shards import Dataset, open_dataset
from pipelines.tables import append, delta_table, parquet, placed, table_files, write_shard
from pipelines.video import decode_clip

log = logging.getLogger(__name__)

TOKEN_SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("n_frames", pa.int32()),
        ("tokens_per_frame", pa.int32()),
        ("tokens", pa.large_binary()),
    ]
)
ROW_GROUP = 32
"""Rows read to get at one; a row is n_frames x N x 2 bytes, 300 kB at the paper's size."""
MOST_CODES = 1 << 16
FRAMES_AT_ONCE = 32
"""Frames an encoder without temporal context takes at once, to bound its memory."""


@dataclass(frozen=True)
class TokenTable:
    """Tokens of a dataset's clips by one tokenizer."""

    folder: Path
    dataset: str
    tokenizer: str

    @classmethod
    def open(cls, dataset: Dataset, tokenizer: str) -> "TokenTable":
        """The tokens that `tokenizer` (name@version) made of this dataset, for every clip of its version.

        Raises:
            UserError: some clips have none.
        """
        table = cls(tokens_folder(dataset, tokenizer), dataset.reference, tokenizer)
        missing = len(set(dataset.index()["clip_id"].to_pylist()) - table.places.keys())
        if missing:
            raise UserError(
                f"{missing} clips of {dataset.reference} have no tokens of {tokenizer}: "
                f"run `lampworks tokenize --dataset {dataset.reference} --tokenizer {tokenizer}` first"
            )
        return table

    @cached_property
    def places(self) -> dict[str, tuple[str, int, int]]:
        """clip_id -> file, row group, row."""
        table = delta_table(self.folder)
        parts = [placed(path, ["clip_id"]) for path in table_files(table, self.folder)] if table else []
        rows = pa.concat_tables(parts).to_pylist() if parts else []
        return {r["clip_id"]: (r["file"], r["row_group"], r["row"]) for r in rows}

    @cached_property
    def _kept(self) -> dict[str, np.ndarray]:
        return {}

    def read(self, clip_id: str) -> np.ndarray:
        """Tokens of a clip, uint16 (n_frames, N); row groups read last stay at hand."""
        if clip_id not in self._kept:
            if len(self._kept) > 64 * ROW_GROUP:
                self._kept.clear()
            name, group, _ = self.places[clip_id]
            rows = parquet(self.folder / name).read_row_group(group)
            for row in rows.to_pylist():
                tokens = np.frombuffer(row["tokens"], dtype="<u2")
                self._kept[row["clip_id"]] = tokens.reshape(row["n_frames"], row["tokens_per_frame"])
        return self._kept[clip_id]


def tokens_folder(dataset: Dataset, tokenizer: str) -> Path:
    """Where the tokens of a tokenizer (name@version) lie."""
    return dataset.folder / f"tokens-{tokenizer.replace('@', '-')}"


class Encoder:
    """Ray Data's actor: a row that names clips becomes a token file of them, and a row about that."""

    def __init__(self, home: Path, dataset: str, tokenizer: Path, folder: Path) -> None:
        import torch

        from models.checkpoint import load_model
        from models.tokenizer import Tokenizer

        self.dataset = open_dataset(Home(home), dataset)
        self.index, self.folder = self.dataset.index(), folder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = cast(Tokenizer, load_model(tokenizer, self.device, "tokenizer"))

    def __call__(self, unit: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A token file for the unit's clips; an existing one is taken as it is, for it was renamed when whole."""
        unit_id = str(unit["unit_id"][0])
        path = self.folder / f"{unit_id}.parquet"
        if not path.exists():
            write_shard(path, [self.row(int(n)) for n in unit["clips"][0]], TOKEN_SCHEMA, ROW_GROUP)
        return {"unit_id": np.array([unit_id]), "clips": np.array([len(unit["clips"][0])])}

    def row(self, clip: int) -> dict[str, Any]:
        """The table's row of one clip."""
        frames = decode_clip(self.dataset.read_clips(self.index.slice(clip, 1))[0])
        tokens = np.concatenate([self.encode(part) for part in self._parts(frames)]).astype("<u2")
        return {
            "clip_id": self.index["clip_id"][clip].as_py(),
            "n_frames": tokens.shape[0],
            "tokens_per_frame": tokens.shape[1],
            "tokens": tokens.tobytes(),
        }

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 (T,H,W,3) -> tokens (T,N)."""
        import torch

        return self.model.encode(torch.from_numpy(frames)[None].to(self.device))[0].cpu().numpy()

    def _parts(self, frames: np.ndarray) -> Iterator[np.ndarray]:
        step = len(frames) if self.model.cfg.encoder.temporal else FRAMES_AT_ONCE
        for start in range(0, len(frames), step):
            yield frames[start : start + step]


def tokenize(config: TokenizeConfig) -> TokenTable:
    """Tokenizes the clips of a dataset that have no tokens yet; run twice, the second time has nothing to do.

    Raises:
        UserError: dataset or tokenizer is missing, or their resolutions differ.
    """
    home = Home(config.home).ensure()
    dataset = open_dataset(home, config.dataset)
    artifact = resolve(home, config.tokenizer, kind="tokenizer")
    check_tokenizer(dataset, artifact)
    table = TokenTable(tokens_folder(dataset, artifact.reference), dataset.reference, artifact.reference)
    ids = dataset.index()["clip_id"].to_pylist()
    missing = [n for n, clip_id in enumerate(ids) if clip_id not in table.places]
    log.info("tokenize %s with %s | clips %d | to do %d", dataset.reference, artifact.reference, len(ids), len(missing))
    if missing:
        units = _units(config, artifact, ids, missing)
        with connect(config.cluster):
            _encode(config, home, dataset, artifact, table.folder, units)
    return TokenTable.open(dataset, artifact.reference)


def check_tokenizer(dataset: Dataset, tokenizer: Artifact) -> None:
    """That the tokenizer takes this dataset's frames.

    Raises:
        UserError: another resolution, or more codes than a uint16 holds.
    """
    settings = tokenizer.config
    check_size(dataset, settings["height_px"], settings["width_px"], tokenizer.reference)
    if settings["codebook"]["size"] > MOST_CODES:
        raise UserError(f"{tokenizer.reference} has {settings['codebook']['size']} codes: at most {MOST_CODES} fit")


def check_size(dataset: Dataset, height_px: int, width_px: int, model: str) -> None:
    """That frames of the dataset have the size a model takes.

    Raises:
        UserError: they have not.
    """
    row = dataset.clip_table(["width_px", "height_px"]).slice(0, 1).to_pylist()[0]
    if (row["height_px"], row["width_px"]) != (height_px, width_px):
        raise UserError(
            f"{dataset.reference} has clips of {row['width_px']}x{row['height_px']} px, {model} takes "
            f"{width_px}x{height_px}: curate the videos at that size, or train a tokenizer on this dataset"
        )


def _units(config: TokenizeConfig, artifact: Artifact, ids: list[str], missing: list[int]) -> list[dict[str, Any]]:
    """Clips in files; a file's name follows from its clips, so a file left by a killed run is found again."""
    size = config.clips_per_shard
    groups = [missing[start : start + size] for start in range(0, len(missing), size)]
    return [{"unit_id": digest([artifact.fingerprint, [ids[n] for n in g]])[:24], "clips": g} for g in groups]


def _encode(
    config: TokenizeConfig, home: Home, dataset: Dataset, artifact: Artifact, folder: Path, units: list[dict[str, Any]]
) -> None:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = (
        ray.data.from_items(units, override_num_blocks=len(units))
        .map_batches(
            Encoder,
            fn_constructor_args=(home.path, dataset.reference, artifact.path, folder),
            batch_size=None,
            num_cpus=1,
            num_gpus=config.gpus_per_worker,
            compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(units))),
        )
        .iter_rows()
    )
    facts = {"dataset": dataset.reference, "tokenizer": artifact.reference, "fingerprint": artifact.fingerprint}
    began, clips, total = time.monotonic(), 0, sum(len(u["clips"]) for u in units)
    for row in done:
        unit_id = row["unit_id"]
        append(folder, TOKEN_SCHEMA, delta_table(folder), [(unit_id, folder / f"{unit_id}.parquet")], facts)
        clips += row["clips"]
        rate = clips / (time.monotonic() - began)
        log.info("tokenized %d/%d clips | %.1f clips/s | eta %.0f s", clips, total, rate, (total - clips) / rate)
