"""The only file that knows MLflow's runs: one per piece of work, however often its process dies or the server is away.

Everything a run says first goes into an outbox file beside the work and is sent from there. A restart opens the
same run again (found by its key), an outage only lets the outbox grow, and nothing waits for the server.
"""

import functools
import importlib.util
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.config import Home, TrackingConfig
from infra.registry import connect, experiment_id, register

if TYPE_CHECKING:
    import mlflow.entities
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

REFUSED = "INVALID_PARAMETER_VALUE"
OUTBOX, STATE = "tracking.jsonl", "tracking.json"
KEY_TAG = "lampworks.key"
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
NOTE_LIMIT = 4500
"""MLflow keeps 5000 characters of a tag value on every store."""
PARAM_LIMIT = 6000
BATCH = 800
"""Metrics in one request; MLflow takes at most 1000."""
RETRY_S = 15.0


class Run:
    """One MLflow run that outlives its processes.

    Args:
        config: which server and experiment.
        home: its embedded store is used when the config names no server.
        name: the run's name in MLflow.
        key: what the run is about, such as an identity digest: the same key is the same run.
        folder: where the outbox lives; must survive restarts.
        send_every_s: how often the background thread sends.
        sample_every_s: how often it says what this machine is busy with.
    """

    def __init__(
        self, config: TrackingConfig, home: Home, *, name: str, key: str, folder: Path, send_every_s: float = 3.0,
        sample_every_s: float = 15.0,
    ) -> None:  # fmt: skip
        self.config, self.home, self.name, self.key, self.folder = config, home, name, key, folder
        self.uri = config.uri or home.tracking_uri
        folder.mkdir(parents=True, exist_ok=True)
        self._outbox, self._state_file = folder / OUTBOX, folder / STATE
        self.run_id, self._sent_bytes = _sent(folder)
        self._said: dict[str, int] = self._recorded_steps()
        self._events: list[str] = self._recorded_events()
        self._client: MlflowClient | None = None
        self._lock, self._send_lock, self._closed = threading.Lock(), threading.Lock(), threading.Event()
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._keep_sending, args=(send_every_s, sample_every_s), daemon=True)
        self._thread.start()

    def params(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration; nested mappings become dotted names."""
        self._put({"kind": "params", "values": {k: str(v)[:PARAM_LIMIT] for k, v in flatten(values).items()}})

    def tags(self, values: Mapping[str, str]) -> None:
        """Words about the run, such as its lineage; the newest value of a name stands."""
        self._put({"kind": "tags", "values": dict(values)})

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step. What a run has said of a step before its restart is not said twice."""
        fresh = {k: float(v) for k, v in values.items() if step > self._said.get(k, -1) and np.isfinite(v)}
        if fresh:
            self._said |= dict.fromkeys(fresh, step)
            self._put({"kind": "metrics", "step": step, "values": fresh})

    def sample(self, values: Mapping[str, float]) -> None:
        """Numbers that belong to no step; they are counted."""
        self.metrics(1 + max((self._said.get(name, -1) for name in values), default=0), values)

    def again_after(self, step: int) -> None:
        """What comes after this step is taken anew, and is said again."""
        self._said |= _rewound(self._said, step)
        self._put({"kind": "again", "step": step})

    def file(self, path: Path, to: str = "") -> None:
        """An existing file, kept as an artifact under the folder `to`. It must stay until it is sent."""
        self._put({"kind": "file", "path": str(path), "to": to})

    def model(self, path: Path, reference: str, fingerprint: str) -> None:
        """A published world, for the registry (`infra.registry.register`)."""
        self._put({"kind": "model", "path": str(path), "reference": reference, "fingerprint": fingerprint})

    def event(self, text: str) -> None:
        """A line on the run's timeline: the description MLflow shows on top of the run."""
        self._events.append(f"- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC: {text}")
        while len(self._events) > 1 and len("\n".join(self._events)) > NOTE_LIMIT:
            del self._events[1]
        self._put({"kind": "tags", "values": {NOTE_TAG: "\n".join(self._events)}})

    @property
    def ended(self) -> bool:
        """Whether it was closed well before; a run that goes on after that says more and is closed again."""
        return any(record["value"] == "FINISHED" for record in self._recorded("status"))

    def close(self, status: str = "FINISHED") -> None:
        """Sends what is left and ends the run (FINISHED, FAILED or KILLED). What can't be sent stays in the outbox."""
        self._put({"kind": "status", "value": status})
        self._closed.set()
        self._thread.join()
        self._retry_at = 0.0
        self.flush()
        waiting = self._outbox.stat().st_size - self._sent_bytes
        if waiting:
            log.warning("tracking: %d bytes wait in %s for %s; the next run of this work sends them",
                        waiting, self._outbox, self.uri)  # fmt: skip

    def flush(self) -> bool:
        """Sends the outbox as far as the server takes it; True when nothing is left."""
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        with self._send_lock:
            if time.monotonic() < self._retry_at:
                return False
            try:
                while self._send_some():
                    pass
            except (MlflowException, RequestException, OSError) as error:
                self._retry_at = time.monotonic() + RETRY_S
                log.warning("tracking: %s does not take records (%s); they wait in %s",
                            self.uri, str(error).split("\n")[0][:120], self._outbox)  # fmt: skip
                return False
            return True

    def _put(self, record: dict[str, Any]) -> None:
        line = json.dumps({"time_ms": int(time.time() * 1000), **record}) + "\n"
        with self._lock, self._outbox.open("a") as file:
            file.write(line)

    def _keep_sending(self, every_s: float, sample_every_s: float) -> None:
        machine, due = Machine(), time.monotonic() + sample_every_s
        while not self._closed.wait(every_s):
            if time.monotonic() >= due:
                values, due = machine.sample(), time.monotonic() + sample_every_s
                self.sample(values)
            self.flush()

    def _recorded(self, *kinds: str) -> list[dict[str, Any]]:
        lines = self._outbox.read_text().splitlines() if self._outbox.exists() else []
        return [r for r in map(_parse, lines) if r is not None and r["kind"] in kinds]

    def _recorded_steps(self) -> dict[str, int]:
        said: dict[str, int] = {}
        for record in self._recorded("metrics", "again"):
            step = record["step"]
            said |= _rewound(said, step) if record["kind"] == "again" else dict.fromkeys(record["values"], step)
        return said

    def _recorded_events(self) -> list[str]:
        notes = [r["values"][NOTE_TAG] for r in self._recorded("tags") if NOTE_TAG in r["values"]]
        return notes[-1].split("\n") if notes else []

    def _send_some(self) -> bool:
        """One batch of whole lines; False when the outbox is empty."""
        if not self._outbox.exists():
            return False
        with self._outbox.open("rb") as file:
            file.seek(self._sent_bytes)
            lines = file.readlines(1 << 18)
        whole = [line for line in lines if line.endswith(b"\n")]
        if not whole:
            return False
        client = self._connected()
        metrics: list[tuple[str, float, int, int]] = []
        tags: dict[str, str] = {}
        for record in (r for r in map(_parse, whole) if r is not None):
            if record["kind"] == "metrics":
                metrics += [(k, v, record["time_ms"], record["step"]) for k, v in record["values"].items()]
            elif record["kind"] == "tags":
                tags |= record["values"]
            else:
                self._offer(record["kind"], functools.partial(self._send, client, record))
        self._send_batches(client, metrics, tags)
        self._sent_bytes += sum(map(len, whole))
        self._save_state()
        return True

    def _send_batches(
        self, client: "MlflowClient", rows: list[tuple[str, float, int, int]], tags: dict[str, str]
    ) -> None:
        from mlflow.entities import Metric, RunTag

        send = functools.partial(client.log_batch, self._id())
        if tags:
            self._offer("tags", functools.partial(send, tags=[RunTag(k, v) for k, v in tags.items()]))
        for start in range(0, len(rows), BATCH):
            batch = [Metric(*row) for row in rows[start : start + BATCH]]
            self._offer("metrics", functools.partial(send, metrics=batch))

    def _offer(self, what: str, send: Callable[[], object]) -> None:
        """Sends; what the server finds wrong is told and passed over, or it would hold up all that follows."""
        from mlflow.exceptions import MlflowException

        try:
            send()
        except MlflowException as error:
            if error.error_code != REFUSED:
                raise
            log.warning("tracking: %s refuses %s of this run (%s); it stays in %s",
                        self.uri, what, str(error).split("\n")[0][:200], self._outbox)  # fmt: skip

    def _send(self, client: "MlflowClient", record: dict[str, Any]) -> None:
        from mlflow.entities import Param

        match record["kind"]:
            case "params":
                known = client.get_run(self._id()).data.params  # MLflow refuses to change a parameter
                fresh = [Param(k, v) for k, v in record["values"].items() if k not in known]
                for start in range(0, len(fresh), 100):
                    client.log_batch(self._id(), params=fresh[start : start + 100])
            case "file" if Path(record["path"]).exists():
                client.log_artifact(self._id(), record["path"], record["to"] or None)
            case "model":
                about = Path(record["path"]), record["reference"], record["fingerprint"]
                register(client, experiment_id(client, self.config, self.home), self._id(), *about)
            case "status":
                client.set_terminated(self._id(), record["value"])

    def _id(self) -> str:
        if self.run_id is None:
            raise ValueError("the run is created when it is connected")
        return self.run_id

    def _connected(self) -> "MlflowClient":
        """The client, with the run found by its key or created."""
        if self._client is not None:
            return self._client
        client = connect(self.uri)
        experiment = experiment_id(client, self.config, self.home)
        if self.run_id is None:
            found = _find(client, experiment, self.key)
            above = _find(client, experiment, self.config.parent) if self.config.parent else []
            tags = {KEY_TAG: self.key} | ({PARENT_TAG: above[0].info.run_id} if above else {})
            run = found[0] if found else client.create_run(experiment, run_name=self.name, tags=tags)
            self.run_id = run.info.run_id
            self._save_state()
        client.update_run(self.run_id, status="RUNNING")
        self._client = client
        return client

    def _save_state(self) -> None:
        temporary = self._state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"run_id": self.run_id, "sent_bytes": self._sent_bytes}))
        temporary.replace(self._state_file)


def is_told(folder: Path) -> bool:
    """Whether the run in this folder ended well and its server has all of it, or there never was one."""
    outbox = folder / OUTBOX
    if not outbox.exists():
        return True
    last = _parse(outbox.read_bytes().splitlines()[-1])
    return last is not None and last.get("value") == "FINISHED" and outbox.stat().st_size == _sent(folder)[1]


class Machine:
    """What MLflow's own monitors see of the machine, under the names that its interface shows as system metrics."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor

        kinds: list[Any] = [cpu_monitor.CPUMonitor, disk_monitor.DiskMonitor, network_monitor.NetworkMonitor]
        if Path("/dev/nvidia0").exists() and importlib.util.find_spec("pynvml"):
            kinds.append(gpu_monitor.GPUMonitor)
        self._monitors = [kind() for kind in kinds]
        self.sample()  # use of processors is counted since the last look

    def sample(self) -> dict[str, float]:
        """Use of processors since the last look, of memory and disk, and of the GPUs where there are any."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.clear_metrics()
            monitor.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in monitor.aggregate_metrics().items()}
        return values


def history(config: TrackingConfig, home: Home, key: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric of the run with this key: name -> (step, value) in order; empty when no store answers with one."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    if config.uri is None and not (home.path / "mlflow.db").exists():
        return {}
    client = MlflowClient(tracking_uri=config.uri or home.tracking_uri)
    try:
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            return {}
        runs = _find(client, experiment.experiment_id, key)
        return {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for run in runs
            for name in run.data.metrics
        }
    except MlflowException as error:
        log.warning("tracking: no curves from %s (%s)", config.uri, str(error).split("\n")[0][:120])
        return {}


def _find(client: "MlflowClient", experiment: str, key: str) -> "list[mlflow.entities.Run]":
    """The run with a key, if there is one."""
    return client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _rewound(said: Mapping[str, int], step: int) -> dict[str, int]:
    """What was last said of a training that goes back to this step; its machines only go on.

    Of a copy, as the thread that samples the machine may add names meanwhile.
    """
    return {name: min(last, step) for name, last in list(said.items()) if not name.startswith("system/")}


def _sent(folder: Path) -> tuple[str | None, int]:
    """The run's id, if a server has given it one, and how much of the outbox it took."""
    path = folder / STATE
    state = json.loads(path.read_text()) if path.exists() else {}
    return state.get("run_id"), state.get("sent_bytes", 0)


def _parse(line: str | bytes) -> dict[str, Any] | None:
    """A record, or None for the torn last line of a killed process."""
    try:
        return json.loads(line)
    except ValueError:
        return None
