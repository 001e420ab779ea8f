import json
import threading
import time

import pytest

from lampworks import main
from serving.store import Commit, Row, Session, open_store
from tests.serving.conftest import running_redis, start_redis, stop


def row(step, action=0, context=1):
    return Row(step=step, action=action, context=context, tokens=bytes([step % 256, 0]), jpeg=b"jpeg%d" % step)


def session(name="s", **given):
    values = {
        "id": name, "owner": "me", "model": "world@v1", "seed": 7, "first": 0, "start": 0, "step": 0, "epoch": 0,
        "created": time.time(), "parent": None, "parent_step": None, "prompt": "ab",
    }  # fmt: skip
    return Session(**(values | given))


@pytest.fixture(params=["sqlite", "redis"])
def address(request, tmp_path):
    """Where a fresh journal is: a path, or the URL of a Redis of its own."""
    if request.param == "sqlite":
        yield str(tmp_path / "sessions.db")
        return
    with running_redis(tmp_path) as (url, _):
        yield url


@pytest.fixture
def store(address):
    store = open_store(address)
    store.create(session(), "secret", [row(0, -1)])
    yield store
    store.close()


def test_a_session_opens_with_its_own_token_only(store):
    assert store.open("s", "secret").seed == 7
    assert store.open("s", "forged") is None
    assert store.open("other", "secret") is None


def test_the_token_is_not_in_the_file(store, tmp_path):
    store.close()
    assert all(b"secret" not in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_a_step_lands_once_and_only_in_order(store):
    assert store.commit("s", 0, row(1)) is Commit.OK
    assert store.commit("s", 0, row(1, action=5)) is Commit.DUPLICATE
    assert store.commit("s", 0, row(3)) is Commit.GAP
    assert store.row("s", 1).action == 0, "the first one counts"
    assert [r.step for r in store.rows("s", 0, 9)] == [0, 1]


def test_attaching_fences_the_one_before(store):
    first = store.attach("s")
    second = store.attach("s")
    assert store.commit("s", first.epoch, row(1)) is Commit.FENCED
    assert store.commit("s", second.epoch, row(1)) is Commit.OK
    assert store.attach("nobody") is None
    assert store.commit("nobody", 0, row(1)) is Commit.GONE


def test_of_many_writers_of_one_step_exactly_one_wins(address, store):
    outcomes, steps = [], 30

    def write(number):
        mine = open_store(address)
        for step in range(1, steps + 1):
            while (done := mine.commit("s", 0, row(step, action=number))) is Commit.GAP:
                time.sleep(0.001)
            outcomes.append(done)
        mine.close()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert outcomes.count(Commit.OK) == steps
    assert outcomes.count(Commit.DUPLICATE) == 3 * steps
    assert [r.step for r in store.rows("s", 0, 99)] == list(range(steps + 1))


def test_a_fork_shares_the_past_and_not_the_future(store):
    for step in range(1, 5):
        store.commit("s", 0, row(step, context=step + 1))
    forked = store.fork("s", 2, "f", "other", "me")
    assert (forked.step, forked.parent, forked.parent_step, forked.seed) == (2, "s", 2, 7)
    assert list(store.rows("f", 0, 9)) == list(store.rows("s", 0, 2))
    assert store.commit("f", 0, row(3, action=4)) is Commit.OK
    assert store.row("s", 3).action == 0
    assert store.open("f", "other").step == 3
    assert store.fork("s", 9, "g", "t", "me") is None
    assert store.fork("nobody", 0, "g", "t", "me") is None


def test_the_audit_outlives_the_session(store):
    store.commit("s", 0, row(1, action=4))
    store.create(session("live", seed=8), "x", [row(0, -1)])
    before = {a["id"]: a for a in store.audit()}
    assert (before["s"]["actions"], before["s"]["ended"]) == ([-1, 4], None)
    store.delete("s")
    store.delete("s")
    store.delete("nobody")
    after = {a["id"]: a for a in store.audit()}
    assert after["live"] == before["live"]
    assert after["s"].pop("ended") == pytest.approx(time.time(), abs=60)
    assert after["s"] == {k: v for k, v in before["s"].items() if k != "ended"}
    assert "secret" not in json.dumps(list(after.values()))


def test_usage_counts_sessions_bytes_and_fresh_ones(store):
    store.create(session("old", created=time.time() - 3600), "x", [row(0, -1)])
    store.commit("s", 0, row(1))
    usage = store.usage("me")
    assert (usage.sessions, usage.created_lately) == (2, 1)
    assert usage.bytes == 2 * row(0).size_bytes + row(1).size_bytes
    store.delete("s")
    assert store.usage("me").sessions == 1
    assert store.row("s", 0) is None
    assert store.usage("stranger") == store.usage("nobody")


def test_an_owner_finds_the_own_sessions_newest_first(store):
    for i in range(1, 4):
        store.create(session(f"s{i}", created=time.time() + i), "x", [row(0, -1)])
    store.create(session("other", owner="you"), "x", [row(0, -1)])
    assert [s.id for s in store.owned("me", 3)] == ["s3", "s2", "s1"]
    store.delete("s2")
    assert [s.id for s in store.owned("me", 9)] == ["s3", "s1", "s"]
    assert store.owned("stranger", 9) == []
    assert (store.look("s").id, store.look("s2")) == ("s", None)


def test_a_killed_redis_loses_nothing_and_is_waited_for(tmp_path):
    with running_redis(tmp_path) as (url, server):
        store = open_store(url)
        store.create(session(), "secret", [row(0, -1)])
        for step in range(1, 30):
            assert store.commit("s", 0, row(step)) is Commit.OK
        server.kill()
        server.wait()
        threading.Timer(0.5, lambda: restarted.append(start_redis(tmp_path, url))).start()
        restarted = []
        assert store.commit("s", 0, row(30)) in (Commit.OK, Commit.DUPLICATE), "a lost reply may be asked for again"
        assert [r.step for r in store.rows("s", 0, 99)] == list(range(31))
        store.close()
        stop(restarted[0])


def test_the_audit_command_prints_a_line_a_session(address, store, capsys):
    main(["audit", "--store", address])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line).items() >= {"id": "s", "owner": "me", "seed": 7, "prompt": "ab", "actions": [-1]}.items()


def test_a_redis_that_may_lose_commits_is_told_of(tmp_path, caplog):
    with running_redis(tmp_path) as (url, _):
        store = open_store(url)
        assert not caplog.records
        store._db.config_set("appendfsync", "everysec")
        open_store(url).close()
        assert "appendfsync always" in caplog.text
        store.close()
