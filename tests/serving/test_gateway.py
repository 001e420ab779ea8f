"""The doors, over an engine in this process: what they give, and what they refuse."""

import base64
import concurrent.futures
import contextlib
import hashlib
import json
import resource
import threading
import time

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from serving.client import WorldClient
from serving.config import Limits
from serving.protocol import Flag, FrameMessage, pack_step
from tests.serving.conftest import ACTIONS, SIZE, gateway_of, picture
from tests.serving.test_pictures import encoded, png

JSON = {"content-type": "application/json"}


@pytest.fixture
def http(local):
    with httpx.Client(base_url=local, timeout=30) as http:
        yield http


def create(http, **given):
    return http.post("/v1/sessions", **(given or {"json": {"gallery": "0", "seed": 3}}))


def bearer(session):
    return {"authorization": f"Bearer {session['token']}"}


def refused(answer, status, slug):
    body = answer.json()
    assert (answer.status_code, body["status"]) == (status, status), body
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["type"] == f"urn:lampworks:problem:{slug}"
    assert len(body["detail"]) > 10
    return body


@pytest.fixture
def session(http):
    return create(http).json()


@contextlib.contextmanager
def socket(url, session, token=None, subprotocols=None, **options):
    offered = subprotocols or ["lampworks.v1", f"token.{token or session['token']}"]
    path = f"{url.replace('http', 'ws')}/v1/sessions/{session['session']}/play"
    with connect(path, subprotocols=offered, proxy=None, **options) as ws:
        yield ws


def closed_with(ws, messages=()):
    """The code and reason of the close that ends the connection."""
    with pytest.raises(ConnectionClosed) as closed:
        for message in messages:
            ws.send(message)
        while True:
            ws.recv(timeout=20)
    return closed.value.rcvd.code, closed.value.rcvd.reason


# -- what they give ----------------------------------------------------------------------------------------------------


def test_a_server_says_how_it_is_and_what_it_serves(http):
    assert http.get("/healthz").json()["status"] == "ok"
    assert http.get("/readyz").json() == {"status": "ready", "models": ["toy@v1"]}
    served = http.get("/v1/models").json()["models"]
    assert [(m["reference"], m["actions"], m["gallery"]) for m in served] == [("toy@v1", ACTIONS, ["0", "1", "2"])]
    shown = http.get("/v1/gallery/toy@v1/1.png")
    assert shown.content == encoded(picture(1, SIZE, SIZE))
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/sessions", "/v1/sessions/{session_id}/step", "/v1/sessions/{session_id}/fork"} <= set(paths)


@pytest.mark.parametrize("way", ["multipart", "base64", "base64 list", "gallery"])
def test_a_picture_comes_by_any_way(http, way):
    data = encoded(picture(1, SIZE, SIZE))
    text = base64.b64encode(data).decode()
    ways = {
        "multipart": {"files": {"picture": data}, "data": {"seed": "5", "model": "toy"}},
        "base64": {"json": {"picture": text, "seed": 5}},
        "base64 list": {"json": {"picture": [text], "seed": 5, "model": "toy@v1"}},
        "gallery": {"data": {"gallery": "1", "seed": "5"}, "files": {"x": (None, "")}},
    }
    answer = create(http, **ways[way])
    assert answer.status_code == 201, answer.text
    made = answer.json()
    about = ("step", "actions", "model", "seed", "fps", "width_px")
    assert [made[k] for k in about] == [0, ACTIONS, "toy@v1", 5, 10.0, SIZE]
    body = {"n": 1, "action": 2}
    frame = http.post(f"/v1/sessions/{made['session']}/step", json=body, headers=bearer(made)).json()["frame"]
    reference = create(http, files={"picture": data}, data={"seed": "5"}).json()
    step = http.post(f"/v1/sessions/{reference['session']}/step", json=body, headers=bearer(reference))
    assert step.json()["frame"] == frame, "the same picture and seed are the same world"


def test_a_step_is_taken_once_however_often_it_is_asked_for(http, session):
    path = f"/v1/sessions/{session['session']}"
    first = http.post(path + "/step", json={"n": 1, "action": 2}, headers=bearer(session)).json()
    again = http.post(path + "/step", json={"n": 1, "action": 4}, headers=bearer(session)).json()
    assert (first["replayed"], again["replayed"]) == (False, True)
    assert (again["frame"], again["action"]) == (first["frame"], 2)
    shown = http.get(path, headers=bearer(session)).json()
    assert (shown["step"], shown["parent"]) == (1, None)
    frame = http.get(path + "/frames/1.jpg", headers=bearer(session))
    assert base64.b64encode(frame.content).decode() == first["frame"]
    assert http.delete(path, headers=bearer(session)).status_code == 204
    refused(http.get(path, headers=bearer(session)), 404, "no-such-session")


def test_requests_at_once_for_one_step_agree(http, session):
    path, answers = f"/v1/sessions/{session['session']}/step", []

    def ask(action):
        answers.append(httpx.post(f"{http.base_url}{path}", json={"n": 1, "action": action}, headers=bearer(session)))

    threads = [threading.Thread(target=ask, args=(i % ACTIONS,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert {a.status_code for a in answers} == {200}
    assert len({a.json()["frame"] for a in answers}) == 1


def test_forks_over_rest(http, session):
    path = f"/v1/sessions/{session['session']}"
    for n in range(1, 4):
        http.post(path + "/step", json={"n": n, "action": n}, headers=bearer(session))
    forks = http.post(path + "/fork", json={"step": 2, "n": 3}, headers=bearer(session)).json()["sessions"]
    assert [(f["step"], f["parent"], f["parent_step"]) for f in forks] == [(2, session["session"], 2)] * 3
    assert len({f["token"] for f in forks}) == 3
    refused(http.post(path + "/fork", json={"step": 9}, headers=bearer(session)), 404, "no-such-step")
    body = refused(http.post(path + "/fork", json={"n": 17}, headers=bearer(session)), 422, "too-many-forks")
    assert body["limit"] == 16


def test_the_page_is_safe_by_its_headers(http):
    page = http.get("/")
    assert "<title>Lampworks</title>" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in ("player.js", "link.js", "player.css"):
        assert http.get(f"/player/{name}").status_code == 200
    refused(http.get("/player/..%2Fgateway.py"), 404, "not-found")
    refused(http.get("/player/gateway.py"), 404, "no-such-page")


# -- what they refuse: REST --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "status", "slug"),
    [
        ({"json": {}}, 422, "bad-prompt"),
        ({"json": {"picture": "not base64!"}}, 422, "bad-body"),
        ({"json": {"picture": {"url": "http://127.0.0.1/x.png"}}}, 422, "bad-body"),
        ({"json": [1, 2]}, 422, "bad-body"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 422, "bad-body"),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "bad-body"),
        ({"files": {"picture": b"hello"}}, 415, "not-a-picture"),
        ({"files": {"picture": png(16000, 16000)}}, 413, "picture-too-large"),
        ({"files": [("picture", encoded(picture()))] * 7}, 422, "bad-prompt"),
        ({"json": {"gallery": "../../artifact"}}, 404, "no-such-picture"),
        ({"json": {"gallery": "0", "model": "other"}}, 404, "no-such-model"),
        ({"json": {"gallery": "0", "seed": -1}}, 422, "bad-seed"),
        ({"json": {"gallery": "0", "seed": 2**53}}, 422, "bad-seed"),
        ({"json": {"gallery": "0", "seed": "x"}}, 422, "bad-seed"),
        ({"content": bytes(9 * 2**20)}, 413, "body-too-large"),
        ({"content": (bytes(2**20) for _ in range(9)), "headers": JSON}, 413, "body-too-large"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_is_refused_with_the_reason(http, given, status, slug):
    refused(create(http, **given), status, slug)


@pytest.mark.parametrize(
    ("body", "status", "slug"),
    [
        ({"n": 1, "action": ACTIONS}, 422, "action-out-of-range"),
        ({"n": 1, "action": -1}, 422, "invalid-request"),
        ({"n": 1, "action": "left"}, 422, "invalid-request"),
        ({"n": 3, "action": 0}, 409, "step-out-of-order"),
        ({"n": 1}, 422, "invalid-request"),
        ({"n": 1, "action": 0, "extra": 1}, 422, "invalid-request"),
        ({"n": 2**40, "action": 0}, 422, "invalid-request"),
    ],
)
def test_a_wrong_step_is_refused_with_the_reason(http, session, body, status, slug):
    answer = http.post(f"/v1/sessions/{session['session']}/step", json=body, headers=bearer(session))
    refused(answer, status, slug)


@pytest.mark.parametrize("door", ["", "/history", "/frames/0.jpg", "/export.mp4"])
def test_a_session_opens_with_its_own_token_only(http, session, door):
    other, path = create(http).json(), f"/v1/sessions/{session['session']}{door}"
    missing = http.get(path)
    refused(missing, 401, "token-missing")
    assert missing.headers["www-authenticate"] == "Bearer"
    foreign = refused(http.get(path, headers=bearer(other)), 404, "no-such-session")
    unknown = refused(http.get(f"/v1/sessions/abc{door}", headers=bearer(other)), 404, "no-such-session")
    assert foreign == unknown, "nothing tells a foreign session from none"
    assert http.get(path, headers=bearer(session)).status_code == 200


def test_unknown_doors_are_problems_too(http):
    refused(http.get("/v2"), 404, "not-found")
    refused(http.put("/v1/sessions"), 405, "method-not-allowed")


def test_scripts_of_other_origins_and_other_hosts_are_refused(http, local):
    refused(http.get("/v1/models", headers={"origin": "https://evil.example"}), 403, "foreign-origin")
    assert http.get("/v1/models", headers={"origin": local}).status_code == 200
    refused(http.get("/v1/models", headers={"host": "evil.example"}), 421, "unknown-host")
    assert "access-control-allow-origin" not in http.get("/v1/models").headers


def test_an_allowed_origin_gets_its_cors_headers(served_home, engine, tmp_path):
    friend = {"origin": "https://friend.example"}
    with gateway_of(served_home, engine, tmp_path / "db", origins=("https://friend.example",)) as url:
        allowed = httpx.options(f"{url}/v1/sessions", headers=friend)
        assert allowed.status_code == 204
        assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert httpx.get(f"{url}/v1/models", headers=friend).headers["access-control-allow-origin"]
        refused(httpx.options(f"{url}/v1/sessions", headers={"origin": "https://x.example"}), 403, "foreign-origin")


def test_quotas_say_when_to_come_back(served_home, engine, tmp_path):
    few = Limits(creates_per_min=2)
    with gateway_of(served_home, engine, tmp_path / "a.db", limits=few) as url, httpx.Client(base_url=url) as http:
        assert [create(http).status_code for _ in range(2)] == [201, 201]
        answer = create(http)
        assert refused(answer, 429, "too-many-sessions")["limit"] == 2
        assert int(answer.headers["retry-after"]) > 1
    little = Limits(stored_bytes=2000, steps=2)
    with gateway_of(served_home, engine, tmp_path / "b.db", limits=little) as url, httpx.Client(base_url=url) as http:
        made = create(http).json()
        path = f"/v1/sessions/{made['session']}"
        steps = [http.post(f"{path}/step", json={"n": n, "action": 0}, headers=bearer(made)) for n in (1, 2, 3)]
        refused(steps[2], 409, "session-full")
        answer = create(http)
        assert refused(answer, 429, "storage-full")["limit_bytes"] == 2000
        refused(http.post(f"{path}/fork", json={}, headers=bearer(made)), 429, "storage-full")
        assert http.delete(path, headers=bearer(made)).status_code == 204
        assert create(http).status_code == 201, "deleting makes room"


def test_keys_guard_the_door_where_they_are_set(served_home, engine, tmp_path):
    key = hashlib.sha256(b"opensesame").hexdigest()
    with gateway_of(served_home, engine, tmp_path / "db", keys=(key,)) as url, httpx.Client(base_url=url) as http:
        refused(create(http), 401, "key-needed")
        refused(create(http, json={"gallery": "0"}, headers={"authorization": "Bearer wrong"}), 401, "key-needed")
        assert http.get("/v1/models").json()["key_needed"]
        with WorldClient(url, key="opensesame") as client, client.create(gallery="0") as player:
            assert player.step(1).shape == (SIZE, SIZE, 3)


def test_a_key_lists_and_opens_its_own_sessions(served_home, engine, tmp_path, local):
    keys = tuple(hashlib.sha256(k).hexdigest() for k in (b"mine", b"theirs"))
    with gateway_of(served_home, engine, tmp_path / "db", keys=keys) as url, httpx.Client(base_url=url) as http:
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
        made = [create(http, json={"gallery": "0", "seed": i}, headers=mine).json() for i in range(3)]
        create(http, json={"gallery": "0"}, headers=theirs)
        with socket(url, made[1]) as ws:
            ws.recv(timeout=20)
            listed = http.get("/v1/sessions", headers=mine).json()["sessions"]
        assert [(s["session"], s["playing"]) for s in listed] == [(m["session"], m is made[1]) for m in made[::-1]]
        assert not [s for s in listed if "token" in s]
        assert len(http.get("/v1/sessions?most=2", headers=mine).json()["sessions"]) == 2
        path = f"/v1/sessions/{made[0]['session']}"
        assert http.get(path, headers=mine).status_code == 200
        refused(http.get(path, headers=theirs), 404, "no-such-session")
        refused(http.get("/v1/sessions"), 401, "key-needed")
        refused(http.get("/v1/sessions", headers=bearer(made[0])), 401, "key-needed")
        with socket(url, made[0], token="mine") as ws:
            assert FrameMessage.unpack(ws.recv(timeout=20)).step == 0
    refused(httpx.get(f"{local}/v1/sessions"), 401, "key-needed")


def test_old_tokens_expire(served_home, engine, tmp_path):
    brief = Limits(token_days=0.4 / 86400)
    with gateway_of(served_home, engine, tmp_path / "db", limits=brief) as url, httpx.Client(base_url=url) as http:
        made = create(http).json()
        time.sleep(0.5)
        refused(http.get(f"/v1/sessions/{made['session']}", headers=bearer(made)), 401, "token-expired")


# -- what they refuse: the play socket ---------------------------------------------------------------------------------


def test_the_socket_greets_steps_and_repeats(local, session):
    with socket(local, session) as ws:
        assert ws.subprotocol == "lampworks.v1"
        greeting = FrameMessage.unpack(ws.recv())
        assert (greeting.step, greeting.flags, greeting.action) == (0, Flag.GREETING, 255)
        ws.send(pack_step(1, 3))
        frame = FrameMessage.unpack(ws.recv())
        assert (frame.step, frame.action) == (1, 3)
        assert frame.timings.model_s > 0
        ws.send(pack_step(1, 0))
        again = FrameMessage.unpack(ws.recv())
        assert (again.jpeg, again.action, again.flags) == (frame.jpeg, 3, Flag.REPLAYED)
    with socket(local, session) as ws:
        assert FrameMessage.unpack(ws.recv()).jpeg == frame.jpeg


@pytest.mark.parametrize(
    ("message", "code", "says"),
    [
        ("text", 4400, "got text"),
        (b"1234", 4400, "5 bytes"),
        (bytes(6), 4400, "5 bytes"),
        (bytes(100_000), 4400, "5 bytes"),
        (pack_step(1, ACTIONS), 4422, f"actions 0 to {ACTIONS - 1}"),
        (pack_step(5, 0), 4409, "the next is 1"),
        (pack_step(2**32 - 1, 0), 4409, "the next is 1"),
    ],
)
def test_a_wrong_message_closes_with_its_reason(local, session, message, code, says):
    with socket(local, session) as ws:
        got, reason = closed_with(ws, [message])
    assert got == code
    assert says in reason


def test_a_message_of_megabytes_is_not_taken_in(local, session):
    """Its header is enough; the client may still be sending when the connection is gone, and then sees no code."""
    with socket(local, session) as ws, pytest.raises(ConnectionClosed) as closed:
        ws.send(bytes(17 * 2**20))
        while True:
            ws.recv(timeout=20)
    assert closed.value.rcvd is None or closed.value.rcvd.code == 1009


def test_a_socket_needs_the_right_token_and_protocol(http, local, session):
    other = create(http).json()
    with socket(local, session, token=other["token"]) as ws:
        assert closed_with(ws)[0] == 4404
    with socket(local, session, subprotocols=["lampworks.v1"]) as ws:
        assert closed_with(ws)[0] == 4401
    with socket(local, session, subprotocols=[f"token.{session['token']}"]) as ws:
        assert closed_with(ws)[0] == 4400
    with socket(local, session, origin="https://evil.example") as ws:
        assert closed_with(ws) == (4403, "scripts of 'https://evil.example' may not call: start it with --origins")


def test_a_flood_is_cut_off(local, session):
    with socket(local, session) as ws:
        assert closed_with(ws, [pack_step(1, 0)] * 5000)[0] == 4429


def test_the_newest_action_counts_when_a_player_is_ahead(served_home, engine, tmp_path):
    """The pace holds the second step back for a second; what is pressed meanwhile is one step, the last one."""
    with gateway_of(served_home, engine, tmp_path / "db", limits=Limits(steps_per_s=1)) as url:
        made = httpx.post(f"{url}/v1/sessions", json={"gallery": "0"}).json()
        with socket(url, made) as ws:
            ws.recv()
            ws.send(pack_step(1, 0))
            assert FrameMessage.unpack(ws.recv()).action == 0
            for action in (0, 1, 2, 3):
                ws.send(pack_step(2, action))
            frame = FrameMessage.unpack(ws.recv())
            assert (frame.step, frame.action) == (2, 3)
            with pytest.raises(TimeoutError):
                ws.recv(timeout=1.5)


def test_idle_players_are_let_go(served_home, engine, tmp_path):
    with gateway_of(served_home, engine, tmp_path / "db", limits=Limits(idle_s=0.5)) as url:
        made = httpx.post(f"{url}/v1/sessions", json={"gallery": "0"}).json()
        with socket(url, made) as ws:
            assert closed_with(ws)[0] == 4408


def test_surplus_players_wait_in_line_and_a_full_line_says_so(served_home, engine, tmp_path):
    limits = Limits(live_players=1, waiting_players=2)
    with (
        gateway_of(served_home, engine, tmp_path / "db", limits=limits) as url,
        httpx.Client(base_url=url) as http,
        contextlib.ExitStack() as stack,
    ):
        playing, second, third, fourth, foreign = (create(http).json() for _ in range(5))
        first = stack.enter_context(socket(url, playing))
        first.recv(timeout=20)
        waiting = [stack.enter_context(socket(url, made)) for made in (second, third)]
        told = [json.loads(ws.recv(timeout=20)) for ws in waiting]
        assert told == [{"state": "queued", "position": 1}, {"state": "queued", "position": 2}]
        with socket(url, fourth) as ws:
            code, reason = closed_with(ws)
            assert (code, reason) == (4429, "1 players are served and 2 wait: retry in 15 s")
        with socket(url, foreign, token=fourth["token"]) as ws:
            assert closed_with(ws)[0] == 4404, "who may not play need not wait to hear it"
        assert http.get("/healthz").json()["players"] == 1
        first.close()
        greeting = next(m for m in iter(lambda: waiting[0].recv(timeout=20), None) if isinstance(m, bytes))
        assert FrameMessage.unpack(greeting).flags == Flag.GREETING, "the next one plays"
        waiting[1].send(pack_step(1, 0))
        while json.loads(waiting[1].recv(timeout=20)) != {"state": "queued", "position": 1}:
            pass
        waiting[0].close()
        while not isinstance(greeting := waiting[1].recv(timeout=20), bytes):
            pass
        assert FrameMessage.unpack(waiting[1].recv(timeout=20)).step == 1, "what was pressed in line counts"


def test_a_place_in_line_is_given_up_by_leaving(served_home, engine, tmp_path):
    limits = Limits(live_players=1, waiting_players=1)
    with gateway_of(served_home, engine, tmp_path / "db", limits=limits) as url, WorldClient(url) as client:
        one, two, three = (client.create(gallery="0") for _ in range(3))
        one.step(1)
        with socket(url, {"session": two.id, "token": two.token}) as ws:
            ws.recv(timeout=20)
        time.sleep(2.5)  # it is noticed when the position is told the next time
        frames = []
        late = threading.Thread(target=lambda: frames.append(three.step(1)))
        late.start()
        time.sleep(0.5)
        one.close()
        late.join(20)
        assert len(frames) == 1, "a client waits in line by itself"
        three.close()


def test_prompts_are_read_a_few_at_a_time_and_not_for_ever(served_home, engine, tmp_path):
    """A body that never ends holds a place for `body_s`; the line behind it is bounded, and says so."""
    limits = Limits(creates_at_once=1, body_s=4.0)

    def endless():
        yield b'{"gallery":'
        over.wait(30)
        yield b'"0"}'

    over = threading.Event()

    with gateway_of(served_home, engine, tmp_path / "db", limits=limits) as url:
        answers = []

        def ask(**given):
            answers.append(httpx.post(f"{url}/v1/sessions", timeout=30, **given))

        threads = [threading.Thread(target=ask, kwargs={"content": endless(), "headers": JSON})]
        threads[0].start()
        time.sleep(1)
        threads += [threading.Thread(target=ask, kwargs={"json": {"gallery": "0"}}) for _ in range(6)]
        [t.start() for t in threads[1:]]
        [t.join() for t in threads[1:]]
        over.set()
        threads[0].join()
        got = [a.status_code for a in answers]
        assert (got.count(408), got.count(201) + got.count(429)) == (1, 6)
        assert got.count(429) >= 1
        body = refused(next(a for a in answers if a.status_code == 429), 429, "server-full")
        assert (body["limit"], body["position"], body["retry_after_s"]) == (1, 5, 15.0)
        assert next(a for a in answers if a.status_code == 429).headers["retry-after"] == "15"
        assert refused(next(a for a in answers if a.status_code == 408), 408, "body-too-slow")["limit_s"] == 4.0


def test_every_door_bounds_its_body(served_home, engine, tmp_path):
    """A body without a length that is too long, and one that does not end."""
    limits = Limits(body_s=1.0, picture_bytes=2**16)
    over = threading.Event()

    def endless():
        yield b'{"n": 1,'
        over.wait(30)

    with gateway_of(served_home, engine, tmp_path / "db", limits=limits) as url, httpx.Client(base_url=url) as http:
        made = create(http).json()
        path, headers = f"/v1/sessions/{made['session']}", {**bearer(made), **JSON}
        doors = [f"{path}/step", f"{path}/fork", "/v1/rollouts", "/v1/sessions"]
        for door in doors:
            long = http.post(door, content=iter([b"[" + b" " * 2**15] * 3), headers=headers)
            assert refused(long, 413, "body-too-large")["limit_bytes"] == 2**16
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            slow = [pool.submit(http.post, door, content=endless(), timeout=30, headers=headers) for door in doors]
            assert not concurrent.futures.wait(slow, 0.5).done
            time.sleep(1.5)
            over.set()
            for answer in slow:
                assert refused(answer.result(), 408, "body-too-slow")["limit_s"] == 1.0


def test_a_fast_player_is_slowed_down_not_refused(served_home, engine, tmp_path):
    with contextlib.ExitStack() as stack:
        limits = Limits(steps_per_s=20)
        url = stack.enter_context(gateway_of(served_home, engine, tmp_path / "db", limits=limits))
        client = stack.enter_context(WorldClient(url))
        player = stack.enter_context(client.create(gallery="0"))
        player.step(0)
        began = time.perf_counter()
        for _ in range(8):
            player.step(1)
        assert time.perf_counter() - began > 7 / 20


def test_who_attaches_last_plays(local, session):
    with socket(local, session) as first:
        first.recv(timeout=20)
        with socket(local, session) as second:
            second.recv(timeout=20)
            code, reason = closed_with(first, [pack_step(1, 0)])
            assert (code, "opened somewhere else" in reason) == (4410, True)
            second.send(pack_step(1, 2))
            assert FrameMessage.unpack(second.recv(timeout=20)).action == 2


def test_a_deleted_session_ends_its_socket(http, local, session):
    with socket(local, session) as ws:
        ws.recv()
        http.delete(f"/v1/sessions/{session['session']}", headers=bearer(session))
        assert closed_with(ws, [pack_step(1, 0)])[0] == 4404


def test_a_player_who_never_reads_costs_no_memory(served_home, engine, tmp_path):
    """Who asks on without reading either waits for the socket to drain, or runs ahead of the lockstep and is closed."""
    limits = Limits(steps_per_s=1e6, messages_per_s=1e6)
    with gateway_of(served_home, engine, tmp_path / "db", limits=limits) as url, httpx.Client(base_url=url) as http:
        made = create(http).json()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with socket(url, made, max_queue=1, close_timeout=0.5) as ws, contextlib.suppress(ConnectionClosed):
            for n in range(1, 20_000):
                ws.send(pack_step(n, 0))
        assert http.get("/healthz").json()["status"] == "ok"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"
        shown = http.get(f"/v1/sessions/{made['session']}", headers=bearer(made)).json()
        assert shown["step"] < 20_000


def test_tokens_stay_out_of_logs_and_addresses(http, local, caplog):
    caplog.set_level(0)
    made = create(http).json()
    with socket(local, made) as ws:
        ws.recv()
    http.get(f"/v1/sessions/{made['session']}", headers=bearer(made))
    ours = [r.getMessage() for r in caplog.records if r.name.startswith(("serving", "uvicorn", "starlette", "fastapi"))]
    assert any("session created" in line for line in ours)
    assert not [line for line in ours if made["token"] in line]
