import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocol import Flag, FrameMessage, Problem, Timings, pack_step, unpack_step

micros = st.integers(0, 2**32 - 1)


@given(
    step=st.integers(0, 2**32 - 1), action=st.integers(0, 255), flags=st.sampled_from(list(Flag)),
    times=st.tuples(micros, micros, micros, micros), jpeg=st.binary(max_size=64),
)  # fmt: skip
def test_a_frame_message_survives_the_wire(step, action, flags, times, jpeg):
    queue, model, encode, commit = (t / 1e6 for t in times)
    timings = Timings(queue_s=queue, model_s=model, encode_s=encode, commit_s=commit)
    got = FrameMessage.unpack(FrameMessage(step=step, action=action, flags=flags, timings=timings, jpeg=jpeg).pack())
    assert (got.step, got.action, got.flags, got.jpeg) == (step, action, flags, jpeg)
    assert got.timings.model_s == pytest.approx(model, abs=2e-6)


@given(step=st.integers(0, 2**32 - 1), action=st.integers(0, 255), actions=st.integers(1, 255))
def test_an_action_is_taken_exactly_when_the_world_has_it(step, action, actions):
    message = pack_step(step, action)
    assert len(message) == 5
    if action < actions:
        assert unpack_step(message, actions) == (step, action)
    else:
        with pytest.raises(Problem) as refused:
            unpack_step(message, actions)
        assert refused.value.close_code == 4422
        assert f"action {action}" in refused.value.detail


@given(st.binary(max_size=40).filter(lambda b: len(b) != 5))
def test_a_message_of_another_length_is_refused(message):
    with pytest.raises(Problem) as refused:
        unpack_step(message, 8)
    assert refused.value.close_code == 4400


@pytest.mark.parametrize("message", [b"", b"\x01short", b"\x02" + bytes(40)])
def test_what_is_no_frame_message_is_refused(message):
    with pytest.raises(ValueError, match="not a version 1 frame message"):
        FrameMessage.unpack(message)


def test_a_problem_says_its_limit_and_when_to_come_back():
    problem = Problem(429, "too-many-sessions", "wait", retry_after_s=1.6, limit=3)
    assert problem.body() == {
        "type": "urn:lampworks:problem:too-many-sessions", "title": "Too many sessions", "status": 429,
        "detail": "wait", "retry_after_s": 1.6, "limit": 3,
    }  # fmt: skip
    assert problem.headers() == {"retry-after": "2"}
    again = Problem.from_body(problem.body())
    assert (again.status, again.slug, again.extra) == (429, "too-many-sessions", {"limit": 3})
