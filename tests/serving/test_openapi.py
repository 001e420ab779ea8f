"""The doors do what their own OpenAPI document says, whatever is sent to them (schemathesis)."""

import os

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from serving.config import Limits
from tests.serving.conftest import gateway_of
from tests.serving.test_gateway import create

MANY = int(os.environ.get("LAMPWORKS_EXAMPLES", "10"))
EXAMPLES = settings(max_examples=MANY, deadline=None, database=None, suppress_health_check=list(HealthCheck))
NOT_OURS = [ignored_auth, positive_data_acceptance]
"""A token that is not the session's own gets 404, as no session does, where the first wants 401. What a picture is and
which actions a world has no schema says, where the second wants it said."""
DOORS = 15


@pytest.fixture(scope="module")
def url(served_home, engine, tmp_path_factory):
    free = Limits(creates_per_min=10**6)
    with gateway_of(served_home, engine, tmp_path_factory.mktemp("doors") / "db", limits=free) as url:
        yield url


@pytest.fixture(scope="module")
def doors(url):
    found = [result.ok() for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    assert len(found) == DOORS
    return found


def hold(doors, number, aim=lambda case: None):
    """Sends examples to every door and checks each answer against the document."""
    for door in doors:

        @seed(number)
        @EXAMPLES
        @given(case=door.as_strategy())
        def holds(case):
            case.call_and_validate(excluded_checks=NOT_OURS, headers=aim(case))

        holds()


def test_strangers_get_what_the_document_says(doors):
    hold(doors, 1)


def test_players_get_what_the_document_says(doors, url):
    """The same with a session behind the door, made again when an example has deleted it."""
    held = {}

    def aim(case):
        path = f"{url}/v1/sessions/{held.get('session')}"
        if not held or not httpx.get(path, headers=held["headers"]).is_success:
            with httpx.Client(base_url=url) as http:
                made = create(http).json()
            headers = {"authorization": f"Bearer {made['token']}"}
            held.update(session=made["session"], headers=headers)
            httpx.post(f"{url}/v1/sessions/{made['session']}/step", json={"n": 1, "action": 0}, headers=headers)
        if "session_id" in (case.path_parameters or {}):
            case.path_parameters["session_id"] = held["session"]
        if isinstance(case.body, dict) and "session" in case.body:
            case.body["session"] = held["session"]
        return held["headers"]

    hold(doors, 2, aim)
