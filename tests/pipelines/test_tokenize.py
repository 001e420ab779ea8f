import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable

from infra.artifact import publish
from infra.config import UserError
from models.checkpoint import build_model, load_model, save_model
from models.config import config_to_dict
from pipelines.config import TokenizeConfig
from pipelines.presets import toy_world
from pipelines.shards import open_dataset
from pipelines.tokenize import TokenTable, tokenize
from pipelines.video import decode_clip
from tests.pipelines.clips import write_dataset


def settings(home, **changes):
    return TokenizeConfig(**{"home": home.path, "dataset": "toys", "clips_per_shard": 2, **changes})


def add_tokenizer(home, name, config):
    torch.manual_seed(1)
    folder = home.path / "new"
    save_model(folder, build_model("tokenizer", config))
    made = publish(home, name=name, kind="tokenizer", source_dir=folder, config=config_to_dict(config), parents={},
                   metrics={}, identity=name)  # fmt: skip
    shutil.rmtree(folder)
    return made


def test_tokens_are_what_the_tokenizer_says_of_any_window(place):
    dataset = open_dataset(place, "toys")
    table, model = TokenTable.open(dataset, "tokenizer@v1"), load_model(place.artifacts / "tokenizer" / "v1")
    rows = dataset.index()
    for n, clip_id in enumerate(rows["clip_id"].to_pylist()):
        frames = decode_clip(dataset.read_clips(rows.slice(n, 1))[0])
        kept = table.read(clip_id)
        assert kept.dtype == np.uint16 and kept.shape == (24, model.cfg.tokens)
        window = model.encode(torch.from_numpy(frames[None, 5:9]))[0].numpy()
        assert np.array_equal(kept[5:9], window)


def test_the_second_time_there_is_nothing_to_do_and_new_clips_are_added(place, ray_cluster):
    folder = place.datasets / "toys" / "tokens-tokenizer-v1"
    before = DeltaTable(str(folder)).version()
    tokenize(settings(place))
    assert DeltaTable(str(folder)).version() == before
    write_dataset(place, unit="u1", clips=3, test=0)
    with pytest.raises(UserError, match="3 clips of toys@1 have no tokens of tokenizer@v1: run `lampworks tokenize"):
        TokenTable.open(open_dataset(place, "toys"), "tokenizer@v1")
    table = tokenize(settings(place))
    assert len(table.places) == 9
    ids = [i for f in DeltaTable(str(folder)).file_uris() for i in pq.read_table(f)["clip_id"].to_pylist()]
    assert len(ids) == len(set(ids)) == 9
    assert DeltaTable(str(folder)).history(1)[0]["dataset"] == "toys@1"


def test_a_temporal_encoder_sees_the_frames_before(place, ray_cluster):
    add_tokenizer(place, "temporal", toy_world().tokenizer)
    table = tokenize(settings(place, tokenizer="temporal"))
    dataset, model = open_dataset(place, "toys"), load_model(place.artifacts / "temporal" / "v1")
    rows = dataset.index()
    clip_id = rows["clip_id"][0].as_py()
    frames = torch.from_numpy(decode_clip(dataset.read_clips(rows.slice(0, 1))[0]))
    assert np.array_equal(table.read(clip_id), model.encode(frames[None])[0].numpy())


def test_a_file_left_by_a_killed_run_is_taken_up(place, ray_cluster):
    write_dataset(place, unit="u1", clips=2, test=0)
    tokenize(settings(place))
    folder = place.datasets / "toys" / "tokens-tokenizer-v1"
    shutil.rmtree(folder / "_delta_log")
    kept = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.parquet")}
    table = tokenize(settings(place, clips_per_shard=2))
    assert len(table.places) == 8
    again = {f.name: f.stat().st_mtime_ns for f in folder.glob("*.parquet")}
    assert any(kept.get(name) == time for name, time in again.items())


def test_another_resolution_or_no_tokenizer_is_refused(place):
    write_dataset(place, name="large", size=64, clips=2, test=0)
    with pytest.raises(UserError, match="large@0 has clips of 64x64 px, tokenizer@v1 takes 32x32: curate the videos"):
        tokenize(settings(place, dataset="large"))
    with pytest.raises(UserError, match="did you mean tokenizer"):
        tokenize(settings(place, tokenizer="tokenizr"))
    with pytest.raises(UserError, match="actions@v1 is a actions, a tokenizer is needed"):
        tokenize(settings(place, tokenizer="actions"))
