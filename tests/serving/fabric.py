"""A served world in a process of its own, on simulated Ray nodes if wanted, that is killed piece by piece on request.

    python -m tests.serving.fabric '{"home": ..., settings}' NODES SEED

Says {"url": ...} on stdout; then for every word on stdin (a key of `ACTORS`, or "node") it kills one such thing with
SIGKILL and says {"killed": word, "pids": [...]}; for "count" it says how many of each there are.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from infra.config import ClusterConfig, from_dict, to_dict
from serving.app import serve_world
from serving.config import ServeConfig
from tests.serving.conftest import SAMPLER, running_redis, start_redis, stop

ROOT = Path(__file__).parent.parent.parent
ACTORS = {
    "model": "#world-",
    "gateway": "#gateway#",
    "fleet": "#fleet#",
    "proxy": "SERVE_PROXY_ACTOR",
    "controller": "SERVE_CONTROLLER_ACTOR",
}
NODE = {"num_cpus": 3}


class Fabric:
    """The parent's side of it: starts the process, and a Redis as its journal where there are several nodes.

    Args:
        home: holds the worlds.
        folder: for logs and the journal.
        nodes: simulated nodes besides the head; 0 is `lampworks serve` on one machine.
        environ: more environment variables.
        seed: of what is killed.
        settings: of `ServeConfig`.
    """

    def __init__(self, home, folder, nodes=0, environ=None, seed=0, **settings):
        self.folder, self._stack = folder, contextlib.ExitStack()
        self.store, self.servers = None, []
        if nodes:
            self.store, server = self._stack.enter_context(running_redis(folder))
            self.servers.append(server)
        config = ServeConfig(home=home.path, port=0, store=self.store, sampler=SAMPLER, **({"world": "toy"} | settings))
        command = [sys.executable, "-m", "tests.serving.fabric", json.dumps(to_dict(config)), str(nodes), str(seed)]
        self.log = self._stack.enter_context((folder / "fabric.log").open("w"))
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, **(environ or {})},
        )  # fmt: skip
        try:
            self.url = self._hear()["url"]
        except BaseException:
            self.close()
            raise

    def ask(self, word):
        """Sends a word; the answer."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._hear()

    def kill(self, word):
        """Ends one thing with SIGKILL; a killed journal is started again, the rest mends itself."""
        if word == "store":
            stop(self.servers[-1])
            time.sleep(0.3)
            self.servers.append(start_redis(self.folder, self.store))
        else:
            assert self.ask(word)["killed"] == word

    def _hear(self):
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        assert line, (self.folder / "fabric.log").read_text()[-4000:]
        return json.loads(line)

    def close(self):
        """Ends everything."""
        try:
            said, _ = self.process.communicate(timeout=240)  # ends its stdin
            assert "graceful_shutdown" not in said, "stopping shows nothing that looks like an error"
        finally:
            self.process.kill()
            if self.servers:
                stop(self.servers[-1])
            self._stack.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def actors(word):
    """Live actors of a kind, from the cluster's own table."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted((a["name"], a["namespace"]) for a in named if ACTORS[word] in a["name"])


def kill_actor(rng, word):
    """Asks one of the kind for its process id, and kills that."""
    deadline = time.monotonic() + 60
    while True:
        try:
            name, namespace = rng.choice(actors(word))
            pid = ray.get(ray.get_actor(name, namespace).__ray_call__.remote(lambda self: os.getpid()), timeout=20)
            os.kill(pid, signal.SIGKILL)
            return [pid]
        except (ray.exceptions.RayError, ValueError, ProcessLookupError):  # it is being replaced just now
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def kill_node(rng, cluster):
    """Every process of a node at once; another node takes its place, as an autoscaler would have it."""
    node = sorted(cluster.worker_nodes, key=lambda n: n.node_id)[rng.integers(len(cluster.worker_nodes))]
    killed = [info.process.pid for infos in node.all_processes.values() for info in infos]
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)
    return killed


def answer(rng, cluster, word):
    if word == "count":
        return {kind: len(actors(kind)) for kind in ACTORS} | {
            name.split("#")[1]: len([n for n, _ in actors("model") if name.split("#")[1] in n])
            for name, _ in actors("model")
        }
    return {"killed": word, "pids": kill_node(rng, cluster) if word == "node" else kill_actor(rng, word)}


def main(settings, nodes, seed):
    rng, cluster, ours = np.random.default_rng(int(seed)), None, ClusterConfig(cpus=6)
    if int(nodes):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        for _ in range(int(nodes)):
            cluster.add_node(**NODE)
        ours = ClusterConfig(address=cluster.address)
    config = from_dict(ServeConfig, json.loads(settings) | {"cluster": to_dict(ours)})
    with serve_world(config) as served:
        say({"url": served.url})
        for line in sys.stdin:
            say(answer(rng, cluster, line.strip()))
    if cluster is not None:
        cluster.shutdown()


def say(what):
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
