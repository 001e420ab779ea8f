"""What Ray exports of a served world, read from the node's own metrics endpoint."""

import time

import httpx
import ray
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from serving.client import WorldClient
from serving.protocol import SUBPROTOCOL
from tests.serving.conftest import SIZE, picture


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
        wanted = {  # every process sends at its own time
            "sessions": lambda f: total(f, "lampworks_sessions_live", 'model="toy@v1"') >= 1,
            "steps": lambda f: total(f, "lampworks_step_latency_s_count", 'part="model"') >= 4,
            "counted": lambda f: total(f, "lampworks_steps") >= 4,
            "duplicates": lambda f: total(f, "lampworks_dup_steps") >= 1,
            "refusals": lambda f: total(f, "lampworks_rejected", 'reason="token-missing"') >= 1,
            "batches": lambda f: total(f, "lampworks_batch_size_count", 'model="toy@v1"') >= 4,
            "caches": lambda f: total(f, "lampworks_kv_bytes") > 0,
            "misses": lambda f: total(f, "lampworks_cache_miss") >= 1,
            "rebuilt": lambda f: total(f, "lampworks_cache_rebuilt") >= 1,
        }
        deadline = time.monotonic() + 120
        while missing := [name for name, holds in wanted.items() if not holds(found := exported())]:
            assert time.monotonic() < deadline, (missing, sorted(found))
            time.sleep(1)
