"""Configuration survives the way to JSON and back, and typing errors get a hint."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.config import ClusterConfig, Home, UserError, digest, from_dict, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    width: int = 8
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    folder: Path | None = None
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.9, 0.95)


numbers = st.integers(-(10**9), 10**9)
inners = st.builds(Inner, width=numbers, rate=st.floats(allow_nan=False, allow_infinity=False))
outers = st.builds(
    Outer,
    name=st.text(max_size=20),
    inner=inners,
    maybe=st.none() | inners,
    folder=st.none() | st.just(Path("some/where")),
    sizes=st.lists(numbers, max_size=4).map(tuple),
    pair=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)


@given(outers)
def test_there_and_back(value):
    again = from_dict(Outer, to_dict(value))
    assert again == value
    assert digest(again) == digest(value)


@given(outers, outers)
def test_digests_tell_values_apart(one, two):
    assert (digest(one) == digest(two)) == (to_dict(one) == to_dict(two))


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})


def test_typing_errors_get_a_hint():
    with pytest.raises(UserError, match=r"did you mean inner\.width"):
        from_dict(Outer, {"name": "x", "inner": {"widht": 3}})
    with pytest.raises(UserError, match="lacks name"):
        from_dict(Outer, {})


def test_bad_values_name_the_flag():
    with pytest.raises(UserError, match="--cluster.cpus is 0"):
        ClusterConfig(cpus=0)


def test_a_home_that_cannot_be_made_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another folder with --home"):
        Home(tmp_path / "file" / "home").ensure()
