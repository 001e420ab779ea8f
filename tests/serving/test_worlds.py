from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.config import TrackingConfig, UserError
from infra.registry import Registry
from serving.config import ServeConfig
from serving.fleet import Catalogue
from serving.protocol import Problem
from serving.replica import application_name, reference_of
from serving.worlds import Choice, Worlds, card
from tests.serving.conftest import publish_toy


def worlds(share):
    choices = {
        "toy": Choice(champion="toy@v3", candidate="toy@v4", share=share),
        "my-world@v1": Choice(champion="my-world@v1"),
    }
    return Worlds({}, {}, choices)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        (None, "toy@v3"), ("", "toy@v3"), ("toy", "toy@v3"), ("toy@champion", "toy@v3"), ("toy@candidate", "toy@v4"),
        ("toy@v4", "toy@v4"), ("toy@4", "toy@v4"), ("toy@3", "toy@v3"), ("my-world@v1", "my-world@v1"),
        ("my-world@1", "my-world@v1"), ("my-world@champion", "my-world@v1"),
    ],
)  # fmt: skip
def test_names_mean_versions(name, want):
    assert worlds(0.0).choose(name, "s") == want


@pytest.mark.parametrize("name", ["toi", "toy@v1", "toy@", "my-world@candidate", "my-world", "../toy", "toy@v3@v3", 7])
def test_what_is_not_offered_is_refused(name):
    with pytest.raises(Problem, match="is not served: toy, my-world@v1, toy@v3") as refused:
        worlds(0.0).choose(name, "s")
    assert refused.value.status == 404


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.floats(0.0, 1.0))
def test_a_canary_share_is_drawn_from_the_session_id(share):
    ids = [f"{n:016x}" for n in range(1000)]
    got = [worlds(share).choose("toy", i) for i in ids]
    assert got == [worlds(share).choose("toy", i) for i in ids]
    assert got.count("toy@v4") == pytest.approx(1000 * share, abs=70)
    wider = [worlds(min(1.0, share + 0.1)).choose("toy", i) for i in ids]
    assert all(b == "toy@v4" for a, b in zip(got, wider, strict=True) if a == "toy@v4"), "a wider canary keeps its own"


def test_aliases_and_order():
    assert worlds(0.1).offered == ["toy@v3", "my-world@v1", "toy@v4"]
    assert worlds(0.1).aliases("toy@v4") == ["candidate"]
    assert worlds(0.1).aliases("toy@v1") == []


@pytest.mark.parametrize("reference", ["toy@v1", "my-world@v12", "a.b_c@v3"])
def test_applications_are_named_after_versions(reference):
    assert reference_of(application_name(reference)) == reference
    assert reference_of("lampworks") is None


def test_a_card_says_what_the_engine_says(served_home, engine):
    assert card("toy@v1", served_home.artifacts / "toy" / "v1") == engine.info


def test_a_name_without_a_champion_stays_what_it_was(world, tmp_path):
    home = publish_toy(world, tmp_path)
    catalogue = Catalogue(ServeConfig(home=home.path, world="toy"))
    assert catalogue.look() == {"toy": Choice(champion="toy@v1")}
    publish_again(home)
    assert catalogue.look() == {"toy": Choice(champion="toy@v1")}, "a training alone changes nothing that is served"
    assert Catalogue(ServeConfig(home=home.path, world="toy")).look() == {"toy": Choice(champion="toy@v2")}


def publish_again(home):
    from infra.artifact import publish

    publish(
        home, name="toy", kind="world", source_dir=home.path.parent / "world", config={}, parents={}, metrics={},
        identity="again",
    )  # fmt: skip


def test_aliases_are_followed(world, tmp_path):
    home = publish_toy(world, tmp_path)
    publish_again(home)
    registry = Registry(TrackingConfig(), home)
    registry.promote("toy@1")
    config = ServeConfig(home=home.path, world=("toy", "toy@champion", "toy@2", str(home.artifacts / "toy" / "v1")))
    catalogue = Catalogue(config)
    fixed = {"toy@2": Choice(champion="toy@v2"), config.worlds[3]: Choice(champion="toy@v1")}
    assert catalogue.look() == {n: Choice(champion="toy@v1") for n in ("toy", "toy@champion")} | fixed
    registry.promote("toy@2", "candidate")
    assert catalogue.look()["toy"].candidate is None, "no canary was asked for"
    canary = Catalogue(replace(config, canary=0.25)).look()["toy"]
    assert canary == Choice(champion="toy@v1", candidate="toy@v2", share=0.25)
    registry.promote("toy@2")
    assert catalogue.look() == {n: Choice(champion="toy@v2") for n in ("toy", "toy@champion")} | fixed
    with pytest.raises(UserError, match="the registry has toy@champion; promote a version"):
        Catalogue(ServeConfig(home=home.path, world="toy@best")).look()


def test_a_registry_that_goes_away_changes_nothing(world, tmp_path):
    home = publish_toy(world, tmp_path)
    Registry(TrackingConfig(), home).promote("toy@1")
    catalogue = Catalogue(ServeConfig(home=home.path, world="toy"))
    before = catalogue.look()
    catalogue._registry = Registry(TrackingConfig(uri="http://127.0.0.1:9"), home)
    assert catalogue.look() == before


def test_an_alias_that_is_taken_away_changes_nothing(world, tmp_path):
    home = publish_toy(world, tmp_path)
    registry = Registry(TrackingConfig(), home)
    registry.promote("toy@1", "candidate")
    catalogue = Catalogue(ServeConfig(home=home.path, world="toy@candidate"))
    assert catalogue.look() == {"toy@candidate": Choice(champion="toy@v1")}
    registry.promote("toy@candidate")
    assert catalogue.look() == {"toy@candidate": Choice(champion="toy@v1")}
