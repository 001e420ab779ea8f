import hashlib

import pytest

from infra.config import UserError
from models.config import SamplerConfig
from serving.config import Limits, ServeConfig


def test_one_world_or_several():
    assert ServeConfig(world="a").worlds == ("a",)
    assert ServeConfig(world=("a", "b@v2")).worlds == ("a", "b@v2")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"world": ()}, "--world is empty"),
        ({"port": 70000}, "--port is 70000"),
        ({"slots": 0}, "--slots is 0"),
        ({"host": "0.0.0.0"}, "reachable from other machines"),
        ({"keys": ("my-password",)}, "SHA-256"),
        ({"sampler": SamplerConfig(policy="rolling")}, "epoch or reprefill"),
    ],
)
def test_a_wrong_setting_says_what_and_the_fix(given, says):
    with pytest.raises(UserError, match=says):
        ServeConfig(**given)


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(UserError, match="--limits.steps-per-s is 0"):
        Limits(steps_per_s=0)


def test_other_machines_may_come_with_a_key():
    key = hashlib.sha256(b"k").hexdigest()
    assert not ServeConfig(host="0.0.0.0", keys=(key,)).loopback
    assert ServeConfig(host="::1").loopback
    assert ServeConfig(host="localhost").loopback
