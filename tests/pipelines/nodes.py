"""A training on simulated Ray nodes, in a process of its own, to which one thing happens.

    python -m tests.pipelines.nodes HOME '{"stage": ..., "zero": ...}' WHAT STEP

The head holds no trainer, so that a node can go without the driver. WHAT happens when the journal tells of STEP:
`replaced`: a node is killed and another one joins; `fewer`: one is killed and none joins; `drained`: `ray drain-node`
with half a minute, then it goes, and another joins. Says when on stdout, as JSON.
"""

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from infra.cluster import environment
from infra.config import ClusterConfig, Home
from pipelines.jobs import plan_job
from pipelines.train import train
from tests.pipelines.ranks import config

NODE = {"num_cpus": 1}
"""One trainer."""
NOTICE_S = 30


def journal(job):
    path = job.folder / "progress.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def say(**what):
    sys.stdout.write(json.dumps({"time_s": time.time(), **what}) + "\n")
    sys.stdout.flush()


def alive():
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def lose(cluster, node):
    """Every process of a node at once; returns when the cluster has seen it."""
    say(did="killed")
    cluster.remove_node(node, allow_graceful=False)
    while node.node_id in alive():
        time.sleep(0.05)
    say(did="seen")


def drain(cluster, node):
    options = {"address": cluster.address, "node-id": node.node_id, "reason": "DRAIN_NODE_REASON_PREEMPTION",
               "reason-message": "reclaimed", "deadline-remaining-seconds": NOTICE_S}  # fmt: skip
    command = [Path(sys.executable).parent / "ray", "drain-node", *(f"--{k}={v}" for k, v in options.items())]
    subprocess.run(command, check=True, stdout=sys.stderr)
    say(did="noticed")
    time.sleep(NOTICE_S)
    lose(cluster, node)


def training(settings):
    """In a thread, since only the main one can start nodes; what fails there ends it all, so that nobody waits."""
    try:
        train(settings)
    except BaseException:  # noqa: BLE001 whatever it is
        traceback.print_exc()
        os._exit(3)


def happen(cluster, job, what, step):
    while not any(line.get("step", -1) >= step for line in journal(job)):
        time.sleep(0.05)
    node = sorted(cluster.worker_nodes, key=lambda n: n.node_id)[step % len(cluster.worker_nodes)]
    drain(cluster, node) if what == "drained" else lose(cluster, node)
    if what != "fewer":
        cluster.add_node(**NODE)


def main(home, changes, what, step):
    os.environ.update(environment())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        settings = config(Home(home), workers=2, cluster=ClusterConfig(address=cluster.address), **json.loads(changes))
        job = plan_job(settings)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        trainer = threading.Thread(target=training, args=(settings,))
        trainer.start()
        happen(cluster, job, what, int(step))
        trainer.join()
        say(did="trained")
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
