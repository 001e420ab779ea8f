"""The player page in real Chromium."""

import hashlib
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.serving.conftest import ACTIONS, SIZE

CHROMIUM = "/usr/bin/chromium"
SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run",
    "--disable-sync", "--disable-component-update", "--disable-default-apps",
]  # fmt: skip
RESULTS = Path(__file__).parents[2] / "test-results"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, request):
    """A page at desktop size that fails its test on any script error, and leaves a screenshot when the test failed."""
    context = chromium.new_context(viewport=getattr(request, "param", DESKTOP), permissions=["clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(15000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    failed = request.session.testsfailed
    yield page
    if errors or request.session.testsfailed > failed:
        RESULTS.mkdir(exist_ok=True)
        page.screenshot(path=RESULTS / f"{request.node.name}.png", full_page=True)
    context.close()
    assert errors == []


def drawn(page):
    """A digest of the pixels on the canvas."""
    pixels = page.evaluate("""() => {
        const canvas = document.getElementById("canvas");
        return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
    }""")
    return hashlib.sha256(bytes(pixels)).hexdigest()


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
