"""The player page in real Chromium."""

import contextlib
import hashlib
import os
import re
import signal
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from serving.client import WorldClient
from serving.config import Limits
from serving.engine import Engine
from serving.store import open_store
from tests.serving.conftest import (
    ACTIONS,
    GATEWAY,
    SAMPLER,
    SIZE,
    gateway_of,
    picture,
    publish_toy,
    replicas,
    tiny_world,
)
from tests.serving.test_pictures import encoded

CHROMIUM = "/usr/bin/chromium"
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
    "--disable-sync", "--disable-component-update", "--disable-default-apps",
]  # fmt: skip
RESULTS = Path(__file__).parents[2] / "test-results"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium():
    expect.set_options(timeout=20000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, request):
    """A page at desktop size that fails its test on any script error, and leaves a screenshot when the test failed."""
    context = chromium.new_context(viewport=getattr(request, "param", DESKTOP), permissions=["clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(20000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    failed = request.session.testsfailed
    yield page
    if errors or request.session.testsfailed > failed:
        RESULTS.mkdir(exist_ok=True)
        page.screenshot(path=RESULTS / f"{request.node.name}.png", full_page=True)
    context.close()
    assert errors == []


DIGEST = """
window.digest = (id) => {
    const canvas = document.getElementById(id), { width, height } = canvas;
    let hash = 2166136261n;
    for (const byte of canvas.getContext("2d").getImageData(0, 0, width, height).data)
        hash = ((hash ^ BigInt(byte)) * 1099511628211n) & 0xffffffffffffffffn;
    return hash.toString(16);
};
"""


def drawn(page, canvas="canvas"):
    """A digest (FNV-1a) of the pixels on a canvas."""
    page.evaluate(f"() => {{ {DIGEST} }}")
    return page.evaluate("(id) => window.digest(id)", canvas)


def shoot(page, name):
    """A picture of the page for people to look at: `LAMPWORKS_SHOTS=folder`."""
    if os.environ.get("LAMPWORKS_SHOTS"):
        page.screenshot(path=Path(os.environ["LAMPWORKS_SHOTS"]) / f"{name}.png", full_page=True)


def start(page, url):
    page.goto(url)
    page.get_by_role("radio", name="Picture 2").click()
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Play", exact=True).click()
    expect(page.locator("#state")).to_have_attribute("data-state", "live")
    expect(page.locator("#canvas")).to_have_attribute("data-step", "0")


def press(page, key, step):
    page.keyboard.press(key)
    expect(page.locator("#canvas")).to_have_attribute("data-step", str(step))


def test_thirty_presses_draw_thirty_frames(page, local):
    frames = []
    page.on("websocket", lambda ws: ws.on("framereceived", lambda data: frames.append(data)))
    start(page, local)
    assert page.locator("#pad-actions button").count() == ACTIONS
    assert page.locator("#canvas").evaluate("c => [c.width, c.height]") == [SIZE, SIZE]
    seen = [drawn(page)]
    for step in range(1, 31):
        press(page, str(step % ACTIONS + 1), step)
        seen.append(drawn(page))
    received = [f for f in frames if isinstance(f, bytes)]
    assert len(received) == 31
    assert len({f[24:] for f in received[1:]}) == 30, "thirty different frames came"
    assert len(set(seen[1:])) == 30, "and were drawn"
    assert float(page.locator("#rtt").inner_text()) > 0
    assert page.locator("#fact-seed").inner_text() == "7"
    assert page.locator("#fact-model").inner_text() == "toy@v1"
    shoot(page, "game-desktop")
    page.get_by_role("button", name="New world").click()
    expect(page.locator("#recent-list button")).to_have_count(1)
    shoot(page, "start-desktop")


def test_a_killed_gateway_costs_the_page_no_step(page, served):
    start(page, served.url)
    press(page, "1", 1)
    for pid in replicas(GATEWAY):
        os.kill(pid, signal.SIGKILL)
    expect(page.locator("#state")).to_have_attribute("data-state", "resuming")
    expect(page.locator("#state")).to_have_attribute("data-state", "live", timeout=40000)
    for step in range(2, 6):
        press(page, "3", step)
    session, token = page.evaluate(
        "() => JSON.parse(localStorage['lampworks.sessions']).map(s => [s.session, s.token])"
    )[0]
    with WorldClient(served.url) as client:
        assert client.resume(session, token).history()["history"] == [-1, 0, 2, 2, 2, 2]


def test_a_held_key_repeats_at_the_recorded_pace(page, local):
    start(page, local)
    page.keyboard.down("2")
    page.wait_for_timeout(2000)
    page.keyboard.up("2")
    held = int(page.locator("#canvas").get_attribute("data-step"))
    assert 10 <= held <= 22, "the world runs at 10 frames a second"
    page.wait_for_timeout(400)
    assert int(page.locator("#canvas").get_attribute("data-step")) <= held + 1, "and stops with the key"
    page.keyboard.press(" ")
    expect(page.locator("#run")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(800)
    page.keyboard.press(" ")
    page.wait_for_timeout(300)
    ran = int(page.locator("#canvas").get_attribute("data-step"))
    assert ran > held + 2
    press(page, ".", ran + 1)


def test_looking_back_forking_and_coming_back(page, local):
    start(page, local)
    for step in range(1, 7):
        press(page, str(step % ACTIONS + 1), step)
    sixth = drawn(page)
    for step in (5, 4, 3):
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#canvas")).to_have_attribute("data-step", str(step))
    expect(page.locator("#past")).to_be_visible()
    third = drawn(page)
    assert third != sixth
    page.keyboard.press("Escape")
    expect(page.locator("#canvas")).to_have_attribute("data-step", "6")
    assert drawn(page) == sixth
    page.locator("#scrub").fill("3")
    expect(page.locator("#canvas")).to_have_attribute("data-step", "3")
    parent = page.locator("#fact-session").inner_text()
    page.keyboard.press("Escape")
    page.locator("#scrub").fill("3")
    expect(page.locator("#canvas")).to_have_attribute("data-step", "3")
    page.get_by_role("button", name="Fork here").click()
    expect(page.locator("#fact-session")).not_to_have_text(parent)
    expect(page.locator("#canvas")).to_have_attribute("data-step", "3")
    assert drawn(page) == third
    page.locator("#canvas").focus()
    for step in (4, 5, 6):
        press(page, str(step % ACTIONS + 1), step)
    with WorldClient(local) as client:
        kept = page.evaluate("() => JSON.parse(localStorage['lampworks.sessions'])")
        assert len({tuple(client.resume(k["session"], k["token"]).history()["history"]) for k in kept}) == 1
    assert drawn(page) == sixth, "the same actions lead to the same frame"
    page.get_by_role("button", name="New world").click()
    page.locator("#recent-list button").nth(1).click()
    expect(page.locator("#fact-session")).to_have_text(parent)
    expect(page.locator("#canvas")).to_have_attribute("data-step", "6")


def test_a_link_carries_the_session_to_another_browser(page, chromium, local):
    start(page, local)
    press(page, "4", 1)
    mine = drawn(page)
    page.evaluate("() => { navigator.clipboard.writeText = async (text) => { window.copied = text; }; }")
    page.get_by_role("button", name="Copy link").click()
    link = page.evaluate("() => window.copied")
    assert re.fullmatch(re.escape(local) + r"/#session=[0-9a-f]{16}&token=[\w-]{43}", link)
    other = chromium.new_page()
    other.goto(link)
    expect(other.locator("#canvas")).to_have_attribute("data-step", "1")
    assert drawn(other) == mine
    assert "token" not in other.url
    press(other, "1", 2)
    page.keyboard.press("1")
    expect(page.locator("#veil-text")).to_contain_text("opened somewhere else")
    page.get_by_role("button", name="Play here").click()
    expect(page.locator("#canvas")).to_have_attribute("data-step", "2")
    other.close()


def test_video_and_replay(page, local):
    start(page, local)
    for step in range(1, 4):
        press(page, "2", step)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save video").click()
    assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"
    page.get_by_role("button", name="Check replay").click()
    expect(page.locator("#toast")).to_have_text("All 3 steps came out the same, token by token.")


def test_a_picture_may_be_uploaded_or_drawn(page, local, tmp_path):
    (tmp_path / "mine.png").write_bytes(encoded(picture(8)))
    page.goto(local)
    page.get_by_role("tab", name="Upload or paste").click()
    page.locator("#file").set_input_files(tmp_path / "mine.png")
    page.get_by_role("button", name="Play", exact=True).click()
    expect(page.locator("#canvas")).to_have_attribute("data-step", "0")
    uploaded = drawn(page)
    page.get_by_role("button", name="New world").click()
    page.get_by_role("tab", name="Draw").click()
    box = page.locator("#pad").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 120, steps=4)
    page.mouse.up()
    page.get_by_role("button", name="Play", exact=True).click()
    expect(page.locator("#game")).to_be_visible()
    expect(page.locator("#canvas")).to_have_attribute("data-step", "0")
    assert drawn(page) != uploaded
    page.get_by_role("button", name="New world").click()
    (tmp_path / "not.png").write_bytes(b"no picture")
    page.get_by_role("tab", name="Upload or paste").click()
    page.locator("#file").set_input_files(tmp_path / "not.png")
    expect(page.locator("#launch-error")).to_contain_text("Choose a PNG, JPEG or WebP")


@pytest.mark.parametrize("page", [DESKTOP, PHONE], indirect=True, ids=["desktop", "phone"])
def test_the_page_fits_the_screen_and_plays_without_a_mouse(page, local):
    page.goto(local)
    wide = "() => document.documentElement.scrollWidth - innerWidth"
    page.get_by_role("radio", name="Picture 1").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Picture 2")).to_be_focused()
    expect(page.get_by_role("radio", name="Picture 2")).to_be_checked()
    assert page.evaluate(wide) <= 0
    page.locator("#play").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#canvas")).to_have_attribute("data-step", "0")
    expect(page.locator("#canvas")).to_be_focused()
    press(page, "1", 1)
    page.locator("#pad-actions button").nth(2).focus()
    press(page, "Enter", 2)
    assert page.evaluate(wide) <= 0
    for control in ("#canvas", "#pad-actions", "#scrub"):
        box = page.locator(control).bounding_box()
        assert box["y"] + box["height"] <= page.viewport_size["height"], f"{control} is in sight without scrolling"
    page.keyboard.press("Shift+Tab")
    page.get_by_role("button", name="Help and keys").press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).not_to_be_visible()


def test_a_picture_may_be_pasted_or_dropped(page, local):
    page.goto(local)
    expect(page.locator("#play")).to_be_enabled()
    seen = []
    for how in ("paste", "drop"):
        before = drawn(page, "preview")
        page.evaluate(
            """async ([how, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "mine.png", { type: "image/png" }));
            const event = how === "paste"
                ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
                : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
            document.getElementById(how === "paste" ? "main" : "drop").dispatchEvent(event);
        }""",
            [how, list(encoded(picture(11 if how == "paste" else 12)))],
        )
        expect(page.get_by_role("tab", name="Upload or paste")).to_have_attribute("aria-selected", "true")
        page.wait_for_function("([id, old]) => window.digest(id) !== old", arg=["preview", before])
        page.get_by_role("button", name="Play", exact=True).click()
        expect(page.locator("#canvas")).to_have_attribute("data-step", "0")
        seen.append(drawn(page))
        page.get_by_role("button", name="New world").click()
    assert seen[0] != seen[1]


def test_several_pictures_are_frames_of_one_moment(page, local, tmp_path):
    files = []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        files[-1].write_bytes(encoded(picture(i)))
    page.goto(local)
    page.get_by_role("tab", name="Upload or paste").click()
    page.locator("#file").set_input_files(files)
    expect(page.locator("#frames")).to_have_text("3 frames; play goes on from the last.")
    page.get_by_role("button", name="Play", exact=True).click()
    expect(page.locator("#canvas")).to_have_attribute("data-step", "2")
    press(page, "1", 3)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#canvas")).to_have_attribute("data-step", "1")


def test_words_are_taken_where_the_server_takes_them(page, served_home, engine, tmp_path, local, painter):
    page.goto(local)
    expect(page.locator("#play")).to_be_enabled()
    expect(page.locator("#tab-text")).to_be_hidden()

    with gateway_of(served_home, engine, tmp_path / "db", painter=painter) as url:
        page.goto(url)
        page.get_by_role("tab", name="Describe").click()
        expect(page.locator("#play")).to_be_disabled()
        page.locator("#text").fill("a green hill")
        page.get_by_role("button", name="Play", exact=True).click()
        expect(page.locator("#canvas")).to_have_attribute("data-step", "0")
        press(page, "2", 1)


def test_a_world_that_knows_titles_is_told_one(page, local, tmp_path):
    page.goto(local)
    expect(page.locator("#play")).to_be_enabled()
    expect(page.locator("#title-field")).to_be_hidden()

    world = tiny_world(words=3, text_vocabulary=100)
    home = publish_toy(world, tmp_path)
    engine = Engine(world, reference="toy@v1", sampler=SAMPLER, slots=2)
    with gateway_of(home, engine, tmp_path / "db") as url:
        page.goto(url)
        page.get_by_label("Title").fill("Super Lamp")
        page.get_by_role("button", name="Play", exact=True).click()
        expect(page.locator("#canvas")).to_have_attribute("data-step", "0")
    engine.close()
    with contextlib.closing(open_store(str(tmp_path / "db"))) as store:
        assert [told["title"] for told in store.audit()] == ["Super Lamp"]


def test_the_start_lists_worlds_and_sessions(page, served_home, engine, tmp_path):
    keys = (hashlib.sha256(b"sesame").hexdigest(),)
    with gateway_of(served_home, engine, tmp_path / "db", keys=keys) as url:
        with WorldClient(url, key="sesame") as client:
            other = client.create(gallery="1", seed=1)
            other.step(1)
            page.goto(url)
            world = page.get_by_role("radio", name="toy@v1")
            expect(world).to_be_checked()
            expect(world).to_contain_text(f"{SIZE} × {SIZE} · 10 frames/s · {ACTIONS} actions")
            expect(world).to_contain_text("1 player now")
            page.get_by_role("button", name="Play", exact=True).click()
            expect(page.locator("#launch-error")).to_contain_text("needs an API key")
            page.get_by_label("API key").fill("sesame")
            page.get_by_label("API key").blur()
            card = page.locator(f"[data-session='{other.id}']")
            expect(card).to_contain_text("step 1")
            expect(card).to_contain_text("being played")
            other.close()
        card.click()
        expect(page.locator("#canvas")).to_have_attribute("data-step", "1")
        press(page, "1", 2)
        assert "sesame" not in page.evaluate("() => JSON.stringify(localStorage)"), "an API key is kept nowhere"
        page.get_by_role("button", name="New world").click()
        page.get_by_role("button", name="Play", exact=True).click()
        expect(page.locator("#canvas")).to_have_attribute("data-step", "0")
        page.get_by_role("button", name="New world").click()
        expect(page.locator("#recent-list button")).to_have_count(2)


def test_a_full_server_shows_the_place_in_line(page, served_home, engine, tmp_path):
    limits = Limits(live_players=1, creates_per_min=2)
    with gateway_of(served_home, engine, tmp_path / "db", limits=limits) as url, WorldClient(url) as client:
        other = client.create(gallery="1")
        other.step(1)
        page.goto(url)
        page.get_by_role("button", name="Play", exact=True).click()
        expect(page.locator("#state")).to_have_attribute("data-state", "queued")
        expect(page.locator("#veil-text")).to_contain_text("number 1 in line")
        shoot(page, "queued")
        other.close()
        expect(page.locator("#canvas")).to_have_attribute("data-step", "0")
        expect(page.locator("#veil")).to_be_hidden()
        press(page, "1", 1)
        page.get_by_role("button", name="New world").click()
        page.get_by_role("button", name="Play", exact=True).click()
        expect(page.locator("#launch-error")).to_contain_text("2 sessions a minute are allowed")
        expect(page.locator("#state")).to_have_text(re.compile(r"again in \d+ s"))


def test_a_gamepad_plays(page, local):
    start(page, local)
    page.evaluate("""() => {
        window.held = 2;
        navigator.getGamepads = () => [{ buttons: [0, 1, 2, 3].map((i) => ({ pressed: i === window.held })) }];
        window.dispatchEvent(new Event("gamepadconnected"));
    }""")
    expect(page.locator("#pad-actions button[data-down]")).to_have_attribute("data-action", "2")
    page.evaluate("() => { window.held = -1; }")
    expect(page.locator("#pad-actions button[data-down]")).to_have_count(0)
    expect(page.locator("#canvas")).not_to_have_attribute("data-step", "0")
    with WorldClient(local) as client:
        kept = page.evaluate("() => JSON.parse(localStorage['lampworks.sessions'])")[0]
        assert client.resume(kept["session"], kept["token"]).history()["history"][1] == 2


def test_a_finger_plays_on_a_phone(chromium, local):
    context = chromium.new_context(viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    page = context.new_page()
    page.set_default_timeout(20000)
    page.goto(local)
    page.get_by_role("radio", name="Picture 3").tap()
    shoot(page, "start-phone")
    page.get_by_role("button", name="Play", exact=True).tap()
    expect(page.locator("#canvas")).to_have_attribute("data-step", "0")
    page.locator("#pad-actions button").nth(1).tap()
    expect(page.locator("#canvas")).to_have_attribute("data-step", "1")
    page.locator("#pad-actions button").nth(4).tap()
    expect(page.locator("#canvas")).to_have_attribute("data-step", "2")
    shoot(page, "game-phone")
    page.get_by_role("button", name="Fork here").tap()
    expect(page.locator("#toast")).to_contain_text("Forked at step 2")
    context.close()
