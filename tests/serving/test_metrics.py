"""What Ray exports of a served world, read from the node's own metrics endpoint."""

import time

import httpx
import ray
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from serving.client import WorldClient
from serving.protocol import SUBPROTOCOL
from tests.serving.conftest import SIZE, picture

OURS = {
    "lampworks_sessions_live", "lampworks_step_latency_s", "lampworks_failovers", "lampworks_cache_rebuilt",
    "lampworks_fenced", "lampworks_dup_steps", "lampworks_rejected", "lampworks_frames_dropped",
    "lampworks_batch_size", "lampworks_kv_bytes", "lampworks_cache_miss",
}  # fmt: skip


def exported():
    """Lines of ours by name, from every node of the cluster."""
    found = {}
    for node in ray.nodes():
        text = httpx.get(
            f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", trust_env=False
        ).text
        for line in text.splitlines():
            if line.startswith("ray_lampworks_"):
                name, _, value = line.rpartition(" ")
                found[name] = found.get(name, 0.0) + float(value)
    return found


def total(found, start, *parts):
    return sum(v for name, v in found.items() if name.startswith(f"ray_{start}") and all(p in name for p in parts))


def test_steps_sessions_and_refusals_are_counted(served):
    with WorldClient(served.url) as client, client.create(picture(3, SIZE, SIZE), seed=3) as player:
        for action in (0, 1, 2, 3):
            player.step(action)
        body = {"n": 2, "action": 0}
        client.call("POST", f"/v1/sessions/{player.id}/step", token=player.token, json=body)
        with connect(
            f"{served.url.replace('http', 'ws')}/v1/sessions/{player.id}/play", subprotocols=[SUBPROTOCOL], proxy=None
        ) as stranger:
            try:
                stranger.recv()
            except ConnectionClosed as closed:
                assert closed.rcvd.code == 4401
        deadline = time.monotonic() + 90
        while True:
            found = exported()
            if total(found, "lampworks_sessions_live", 'model="toy@v1"') and total(found, "lampworks_rejected"):
                break
            assert time.monotonic() < deadline, sorted(found)
            time.sleep(1)
    assert total(found, "lampworks_step_latency_s_count", 'part="model"') >= 4
    assert total(found, "lampworks_dup_steps") >= 1
    assert total(found, "lampworks_rejected", 'reason="token-missing"') >= 1
    assert total(found, "lampworks_batch_size_count", 'model="toy@v1"') >= 4
    assert total(found, "lampworks_kv_bytes") > 0
    names = {name.removeprefix("ray_").partition("{")[0] for name in found}
    assert all(
        any(n.startswith(o) for n in names)
        for o in OURS - {"lampworks_fenced", "lampworks_failovers", "lampworks_frames_dropped"}
    )
