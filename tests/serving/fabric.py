"""A served world on simulated Ray nodes, in a process of its own, that is killed piece by piece on request.

    python -m tests.serving.fabric HOME STORE SEED

Says {"url": ...} on stdout; then for every word on stdin (a key of `ACTORS`, or "node") it kills one such thing with
SIGKILL and says {"killed": word, "pids": [...]}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from infra.config import ClusterConfig
from serving.app import serve_world
from serving.config import ServeConfig
from tests.serving.conftest import GATEWAY, MODEL, SAMPLER

ACTORS = {
    "model": f"#{MODEL}#",
    "gateway": f"#{GATEWAY}#",
    "proxy": "SERVE_PROXY_ACTOR",
    "controller": "SERVE_CONTROLLER_ACTOR",
}
NODE = {"num_cpus": 3}


def pids(word):
    """Process ids of the live actors of a kind, from the cluster's own table and from themselves."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    found = []
    for actor in actors:
        if ACTORS[word] in actor["name"]:
            handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
            found.append(ray.get(handle.__ray_call__.remote(lambda self: os.getpid()), timeout=20))
    return found


def kill_actor(rng, word):
    deadline = time.monotonic() + 60
    while True:
        try:
            victim = int(rng.choice(pids(word)))
            os.kill(victim, signal.SIGKILL)
            return [victim]
        except (ray.exceptions.RayError, ValueError, ProcessLookupError):  # it is being replaced just now
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def kill_node(rng, cluster):
    """Every process of a node at once; another node takes its place, as an autoscaler would have it."""
    node = sorted(cluster.worker_nodes, key=lambda n: n.node_id)[rng.integers(len(cluster.worker_nodes))]
    killed = [info[0].process.pid for infos in [node.all_processes.values()] for info in infos]
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)
    return killed


def main(home, store, seed):
    rng = np.random.default_rng(int(seed))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(**NODE)
    config = ServeConfig(
        home=Path(home), world="toy", store=store, port=0, gateways=2, replicas=2, slots=4, sampler=SAMPLER,
        cluster=ClusterConfig(address=cluster.address),
    )  # fmt: skip
    with serve_world(config) as served:
        say({"url": served.url})
        for line in sys.stdin:
            word = line.strip()
            say({"killed": word, "pids": kill_node(rng, cluster) if word == "node" else kill_actor(rng, word)})
    cluster.shutdown()


def say(what):
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
