import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import build_model, load_model, save_model, sha256
from models.config import ModelError, SamplerConfig, TokenizerConfig, config_to_dict
from models.world import World


@pytest.fixture
def saved(make_dynamics, tmp_path):
    save_model(tmp_path / "model", make_dynamics())
    return tmp_path / "model"


@pytest.mark.parametrize("part", ["tokenizer", "actions", "dynamics"])
def test_what_is_loaded_is_what_was_saved(make_world, tmp_path, part):
    model = getattr(make_world(), part)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path, kind=part)
    assert loaded.cfg == model.cfg
    assert not loaded.training
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_world_plays_the_same_after_loading(make_world, clip, tmp_path):
    world, sampler = make_world(), SamplerConfig(steps=2)
    world.save(tmp_path)
    loaded = World.load(tmp_path)
    assert loaded.config == world.config
    for a, b in ((world, loaded),):
        frames = [w.step(w.start(clip(1, 2)[0], 3, sampler), 1)[1] for w in (a, b)]
        assert torch.equal(*frames)


def edit(folder, **changes):
    card = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        card[key] = {**card[key], **value} if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(card))


def rewrite(folder, change):
    """Alter the weights and vouch for them anew, as a malicious or broken writer would."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    edit(folder, sha256=sha256(folder / "model.safetensors"))


def flip_a_bit(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    edit(folder, sha256=sha256(folder / "model.safetensors"))


DAMAGE = {
    "no folder": (shutil.rmtree, "config.json does not exist"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
    "a flipped bit": (flip_a_bit, "has digest"),
    "half a file": (truncate, "no readable safetensors file"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is damaged"),
    "no card": (lambda f: (f / "config.json").write_text("[]"), "lacks kind, config or sha256"),
    "another kind": (lambda f: edit(f, kind="tokenizer"), "holds a tokenizer, not a dynamics"),
    "an unknown kind": (lambda f: edit(f, kind="os.system"), "holds a os.system, not a dynamics"),
    "a mistyped setting": (lambda f: edit(f, config={"vocabulry": 3}), "did you mean 'vocabulary'"),
    "another preset's shape": (lambda f: edit(f, config={"vocabulary": 32}), "has shape .* needs"),
    "another preset's layers": (
        lambda f: rewrite(f, lambda s: s.pop("head.bias")), "'head.bias' is on one side only"),
    "not a number": (lambda f: rewrite(f, lambda s: s["head.bias"].fill_(torch.nan)), "head.bias .* not finite"),
    "infinite": (lambda f: rewrite(f, lambda s: s["head.bias"].fill_(torch.inf)), "head.bias .* not finite"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_bad_checkpoint_is_refused_with_what_where_and_the_fix(saved, damage):
    act, words = DAMAGE[damage]
    act(saved)
    with pytest.raises(ModelError, match=words):
        load_model(saved, kind="dynamics")


def test_a_pickle_is_not_executed(saved):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a checkpoint was executed",))

    import pickle

    (saved / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    edit(saved, sha256=sha256(saved / "model.safetensors"))
    with pytest.raises(ModelError, match="no readable safetensors"):
        load_model(saved)


def test_parts_of_different_worlds_do_not_fit(make_world, make_dynamics, tmp_path):
    make_world().save(tmp_path)
    save_model(tmp_path / "dynamics", make_dynamics(vocabulary=32))
    with pytest.raises(ModelError, match="vocabulary is 32, the tokenizer has 16 codes"):
        World.load(tmp_path)


def test_saving_over_an_older_model_leaves_no_rest(make_dynamics, saved):
    other = make_dynamics(actions=5)
    save_model(saved, other)
    assert load_model(saved).cfg.actions == 5
    assert len(list(saved.iterdir())) == 2


def test_models_are_built_from_plain_values():
    cfg = TokenizerConfig()
    assert build_model("tokenizer", json.loads(json.dumps(config_to_dict(cfg)))).cfg == cfg
    with pytest.raises(ModelError, match="no model kind 'tokeniser'"):
        build_model("tokeniser", cfg)
    with pytest.raises(ModelError, match="built from DynamicsConfig, not from TokenizerConfig"):
        build_model("dynamics", cfg)
