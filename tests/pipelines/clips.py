"""A small committed dataset without curation: what training and evaluation stand on."""

import numpy as np

from pipelines.shards import CLIP_SCHEMA, VIDEO_SCHEMA, Unit, Writer
from pipelines.tables import write_shard
from pipelines.video import encode_clip
from tests.pipelines.footage import scroll


def write_dataset(home, name="toys", clips=6, frames=24, size=32, test=2, cuts=(), unit="u0"):
    """Clips of scrolling textures; the last `test` of them are held out. Returns their frames by clip id."""
    folder, made, rows, ledger = home.datasets / name, {}, [], []
    for n in range(clips):
        clip_id, split = f"{unit}c{n:03d}", "test" if n >= clips - test else "train"
        made[clip_id] = scroll(frames, seed=n, size=size)
        facts = dict(clip_id=clip_id, video_id=f"{unit}v{n}", unit_id=unit, split=split, start_s=0.0, fps=10)
        sizes = dict(
            n_frames=frames, width_px=size, height_px=size, codec="h264_444", cut_frames=list(cuts), title=f"Toy {n}"
        )
        rows.append({**dict.fromkeys(CLIP_SCHEMA.names), **facts, **sizes, "video": encode_clip(made[clip_id])})
        kept = dict(video_id=f"{unit}v{n}", unit_id=unit, split=split, outcome="kept", clips=1, dropped_clips=[])
        ledger.append({**dict.fromkeys(VIDEO_SCHEMA.names), **kept})
    write_shard(folder / "clips" / f"{unit}.parquet", rows, CLIP_SCHEMA)
    write_shard(folder / "videos" / f"{unit}.parquet", ledger, VIDEO_SCHEMA)
    Writer(folder).commit([Unit(unit, folder / "clips" / f"{unit}.parquet", folder / "videos" / f"{unit}.parquet")])
    return made


def close(a, b):
    """Largest mean difference over frames, for pictures that went through a codec."""
    return float(np.abs(a.astype(int) - b.astype(int)).mean(axis=(-3, -2, -1)).max())
