import contextlib
import json
import threading
import urllib.error
import urllib.request

import cv2
import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from infra.config import UserError
from pipelines.label import FRAMES, LABELS, Ballot, open_door, read_labels
from pipelines.review_config import LabelConfig
from pipelines.shards import open_dataset
from tests.pipelines.clips import write_dataset

CHROMIUM = "/usr/bin/chromium"


@contextlib.contextmanager
def opened(home):
    """The page, running: its address without the token, and the token."""
    server, address = open_door(LabelConfig(home=home.path, dataset="toys", port=0))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield address.split("#")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def door(home):
    write_dataset(home)
    with opened(home) as place:
        yield place


def ask(place, path, body=None, headers=None, **fields):
    address, token = place
    data = json.dumps(fields).encode() if fields else body
    request = urllib.request.Request(address + path, data, headers or {"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as answer:
        content = answer.read()
        return json.loads(content) if answer.headers["Content-Type"].startswith("application/json") else content


def refused(place, path, **how):
    with pytest.raises(urllib.error.HTTPError) as failed:
        ask(place, path, **how)
    return failed.value.code


def test_each_rating_is_on_disk_before_the_next_clip_comes(home, door):
    first = ask(door, "next")
    assert (first["rated"], first["total"]) == (0, 6)
    second = ask(door, "rate", clip=first["clip"], stars=4)
    assert second["rated"] == 1
    assert second["clip"] != first["clip"]
    assert read_labels(home.datasets / "toys") == {first["clip"]: 4}


def test_a_rating_can_be_taken_back_and_given_anew(home, door):
    first = ask(door, "next")["clip"]
    second = ask(door, "rate", clip=first, stars=1)["clip"]
    ask(door, "rate", clip=second, stars=2)
    assert ask(door, "rate", undo=True)["clip"] == second
    assert ask(door, "rate", undo=True)["clip"] == first
    assert ask(door, "rate", undo=True) == {"clip": first, "rated": 0, "total": 6}
    ask(door, "rate", clip=first, stars=5)
    assert read_labels(home.datasets / "toys") == {first: 5}


def test_started_again_it_goes_on_and_half_a_line_is_no_rating(home, door):
    clip = ask(door, "next")["clip"]
    ask(door, "rate", clip=clip, stars=3)
    with (home.datasets / "toys" / LABELS).open("a") as file:
        file.write('{"clip_id": "u0c00')
    with opened(home) as again:
        state = ask(again, "next")
        assert state["rated"] == 1
        ask(again, "rate", clip=state["clip"], stars=5)
    assert read_labels(home.datasets / "toys") == {clip: 3, state["clip"]: 5}


def test_all_rated_is_said(home, door):
    state = ask(door, "next")
    while state["clip"]:
        state = ask(door, "rate", clip=state["clip"], stars=1)
    assert state == {"clip": None, "rated": 6, "total": 6}


def test_the_order_is_drawn_and_the_same_each_time(home):
    write_dataset(home)
    ballot = Ballot(open_dataset(home, "toys"))
    assert ballot.order == Ballot(open_dataset(home, "toys")).order
    assert ballot.order != sorted(ballot.order)


def test_a_film_shows_the_clip_from_its_first_frame_to_its_last(home, door):
    made = write_dataset(home, name="other", unit="u0")
    clip = ask(door, "next")["clip"]
    picture = cv2.imdecode(np.frombuffer(ask(door, f"film/{clip}"), np.uint8), cv2.IMREAD_COLOR_RGB)
    side = picture.shape[0]
    assert picture.shape[1] == FRAMES * side
    for n, frame in ((0, made[clip][0]), (FRAMES - 1, made[clip][-1])):
        shown = cv2.resize(picture[:, n * side : (n + 1) * side], frame.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(shown.astype(int) - frame).mean() < 12


def test_only_who_has_the_address_gets_in(door):
    address, token = door
    clip = ask(door, "next")["clip"]
    for path in ("next", f"film/{clip}"):
        assert refused((address, "guess"), path) == 403
    assert refused((address, "guess"), "rate", clip=clip, stars=5) == 403
    assert refused(door, "next", headers={"Authorization": f"Bearer {token}", "Host": "evil.example:80"}) == 421
    assert ask(door, "next", headers={"Authorization": f"Bearer {token}"})["rated"] == 0
    assert len(ask(door, f"film/{clip}?token={token}", headers={"X": "y"})) > 100


@pytest.mark.parametrize(
    "how",
    [
        {"clip": "nobody", "stars": 5},
        {"clip": "u0c000", "stars": 6},
        {"clip": "u0c000", "stars": None},
        {"stars": 5},
        {"body": b"no json"},
        {"body": b"[]"},
        {"body": b"x" * 5000},
    ],
)
def test_what_is_no_rating_changes_nothing(home, door, how):
    assert refused(door, "rate", **how) == 400
    assert refused(door, "film/nobody") == 404
    assert read_labels(home.datasets / "toys") == {}


def test_what_cannot_be_served_is_one_sentence(home, door):
    port = int(door[0].rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match="give another --port"):
        open_door(LabelConfig(home=home.path, dataset="toys", port=port))
    with pytest.raises(UserError, match="no dataset"):
        open_door(LabelConfig(home=home.path, dataset="nothing"))


def test_keys_alone_rate_in_a_browser(home, door):
    expect.set_options(timeout=20000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto("#".join(door))
        screen, said = page.locator("#screen"), page.locator("#progress")
        expect(said).to_have_text("0 of 6 rated")
        order = Ballot(open_dataset(home, "toys")).order
        for n, key in enumerate("5132"):
            expect(screen).to_have_attribute("data-clip", order[n])
            page.keyboard.press(key)
            expect(said).to_have_text(f"{n + 1} of 6 rated")
        expect(screen).to_have_attribute("data-clip", order[4])
        page.keyboard.press("Backspace")
        expect(screen).to_have_attribute("data-clip", order[3])
        page.keyboard.press("4")
        expect(screen).to_have_attribute("data-clip", order[4])
        page.get_by_role("button", name="5 good").click()
        expect(said).to_have_text("5 of 6 rated")
        expect(screen).to_have_attribute("data-clip", order[5])
        page.keyboard.press("1")
        expect(said).to_have_text("all 6 rated, thank you")
        browser.close()
    assert errors == []
    assert read_labels(home.datasets / "toys") == dict(zip(order, (5, 1, 3, 4, 5, 1), strict=True))
