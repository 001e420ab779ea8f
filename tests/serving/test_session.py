"""What a session carries besides pictures: the title that its world is told."""

import contextlib
import sqlite3

import httpx
import numpy as np
import pytest

from serving.client import WorldClient
from serving.engine import Engine
from serving.pictures import decode_jpeg
from serving.protocol import Problem
from serving.store import open_store
from serving.worlds import card
from tests.serving.conftest import SAMPLER, SIZE, gateway_of, picture, publish_toy, tiny_world, uninterrupted
from tests.serving.test_gateway import create, refused

ACTS = [1, 4, 0, 2, 2, 3, 1, 0]


@pytest.fixture(scope="module")
def telling(tmp_path_factory):
    """A world that was trained with titles of three words, and its URL."""
    folder, world = tmp_path_factory.mktemp("telling"), tiny_world(words=3, text_vocabulary=100)
    home = publish_toy(world, folder)
    engine = Engine(world, reference="toy@v1", sampler=SAMPLER, slots=2)
    assert card("toy@v1", home.artifacts / "toy" / "v1") == engine.info
    with gateway_of(home, engine, folder / "db") as url:
        yield world, url, folder / "db"
    engine.close()


def test_a_session_keeps_what_its_world_was_told(telling):
    """Past cache epochs, in forks and rollouts, and computed again."""
    world, url, journal = telling
    prompt, titles = picture(2, SIZE, SIZE), ["", "Super Lamp", "super lamp, again"]
    shown = []
    with WorldClient(url) as client, contextlib.ExitStack() as stack:
        for title in titles:
            player = stack.enter_context(client.create(prompt, seed=9, title=title or None))
            ahead = player.rollouts([ACTS])[0]
            shown.append([player.step(a) for a in ACTS])
            want = uninterrupted(world, prompt, 9, ACTS, title)
            assert all(np.array_equal(a, b) for a, b in zip(shown[-1], want, strict=True))
            assert np.array_equal(ahead, want)
            assert player.replay()["equal"]
            fork = stack.enter_context(player.fork(3))
            assert np.array_equal(fork.step(ACTS[3]), want[3])
            assert (player.history()["title"], fork.about["title"]) == (title, title)
    assert len({np.stack(frames).tobytes() for frames in shown}) == 3, "it listens"
    with contextlib.closing(open_store(str(journal))) as store:
        assert {told["title"] for told in store.audit()} == set(titles)


def test_who_does_not_listen_is_told_nothing(local, telling):
    with WorldClient(local) as client, pytest.raises(Problem) as refusal:
        client.create(gallery="0", title="Super Lamp")
    assert (refusal.value.status, refusal.value.slug) == (422, "no-title")
    with httpx.Client(base_url=telling[1]) as http:
        assert http.get("/v1/models").json()["models"][0]["words"] == 3
        refused(create(http, json={"gallery": "0", "title": "x" * 501}), 422, "bad-text")


def test_a_journal_from_before_titles_opens(telling, tmp_path):
    path = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(telling[2])) as new, contextlib.closing(sqlite3.connect(path)) as old:
        new.backup(old)
        old.execute("alter table sessions drop column title")
        old.commit()
    with contextlib.closing(open_store(str(path))) as store:
        told = list(store.audit())
        assert len(told) >= 6
        assert {about["title"] for about in told} == {""}
        forked = store.fork(told[0]["id"], 0, "new", "secret", "me")
        assert forked.title == ""
        assert decode_jpeg(store.row("new", 0).jpeg).shape == (SIZE, SIZE, 3)
