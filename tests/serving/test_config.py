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
        ({"replicas": -1}, "--replicas is -1: give 0 or more"),
        ({"replicas": 3, "max_replicas": 2}, "--max-replicas is 2: give at least 3"),
        ({"replicas": 0, "max_replicas": 0}, "--max-replicas is 0: give at least 1"),
        ({"canary": 1.5}, "--canary is 1.5: give a value from 0"),
        ({"drain_s": -1.0}, "--drain-s is -1"),
        ({"host": "0.0.0.0"}, "reachable from other machines"),
        ({"keys": ("my-password",)}, "SHA-256"),
        ({"sampler": SamplerConfig(policy="rolling")}, "epoch or reprefill"),
    ],
)
def test_a_wrong_setting_says_what_and_the_fix(given, says):
    with pytest.raises(UserError, match=says):
        ServeConfig(**given)


def test_replicas_at_most():
    assert ServeConfig(replicas=0).most_replicas == 1
    assert ServeConfig(replicas=2).most_replicas == 2
    assert ServeConfig(replicas=2, max_replicas=5).most_replicas == 5


def test_a_limit_of_nothing_is_refused():
    with pytest.raises(UserError, match="--limits.steps-per-s is 0"):
        Limits(steps_per_s=0)


def test_other_machines_may_come_with_a_key():
    key = hashlib.sha256(b"k").hexdigest()
    assert not ServeConfig(host="0.0.0.0", keys=(key,)).loopback
    assert ServeConfig(host="::1").loopback
    assert ServeConfig(host="localhost").loopback
