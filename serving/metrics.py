"""What operators see: Prometheus metrics, exported by Ray on every node (`ray_lampworks_...`)."""

import time

from ray.serve.metrics import Counter, Gauge, Histogram

from serving.protocol import Timings

STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
OBSERVED = 100
"""Steps of a second whose latency is observed: four observations cost a gateway a fortieth of a small step."""
BATCHES = (1.5, 2.5, 4.5, 8.5, 16.5, 32.5, 64.5)


class GatewayMetrics:
    """What a gateway counts."""

    def __init__(self) -> None:
        self._live = Gauge("lampworks_sessions_live", "Sessions that are being played.", ("model",))
        self._latency = Histogram("lampworks_step_latency_s", "Parts of a step.", list(STEP_S), ("part",))
        self._steps = Counter("lampworks_steps", "Steps that were computed and committed.")
        self._failovers = Counter("lampworks_failovers", "Steps that waited for another replica.")
        self._rebuilt = Counter("lampworks_cache_rebuilt", "Steps whose cache was rebuilt from the journal.")
        self._fenced = Counter("lampworks_fenced", "Commits of a gateway that had lost the session to another.")
        self._duplicates = Counter("lampworks_dup_steps", "Steps asked for again and answered from the journal.")
        self._rejected = Counter("lampworks_rejected", "Refusals.", ("reason",))
        self._dropped = Counter("lampworks_frames_dropped", "Steps that a newer action replaced before they began.")
        self._seen: set[str] = set()
        self._second, self._observed, self._untold = 0, 0, 0

    def live(self, counts: dict[str, int]) -> None:
        """Sessions by version, a version that is gone has none; called about every second."""
        if self._untold:
            self._steps.inc(self._untold)
            self._untold = 0
        self._seen |= set(counts)
        for model in self._seen:
            self._live.set(counts.get(model, 0), tags={"model": model})

    def step(self, timings: Timings) -> None:
        """A step that was computed and committed; the first ones of every second are observed."""
        self._untold += 1
        if (second := int(time.monotonic())) != self._second:
            self._second, self._observed = second, 0
        self._observed += 1
        if self._observed > OBSERVED:
            return
        for part in ("queue", "model", "encode", "commit"):
            self._latency.observe(getattr(timings, f"{part}_s"), tags={"part": part})

    def failover(self) -> None:
        """A step found no replica at first."""
        self._failovers.inc()

    def rebuilt(self) -> None:
        """A step had to bring its context."""
        self._rebuilt.inc()

    def fenced(self) -> None:
        """A commit came from a superseded owner."""
        self._fenced.inc()

    def duplicate(self) -> None:
        """A committed step was asked for again."""
        self._duplicates.inc()

    def rejected(self, reason: str) -> None:
        """A client was refused; `reason` is the problem's slug."""
        self._rejected.inc(tags={"reason": reason})

    def dropped(self) -> None:
        """The newest action won."""
        self._dropped.inc()


class EngineMetrics:
    """What an engine counts.

    Args:
        model: reference of its world.
    """

    def __init__(self, model: str) -> None:
        tags = {"model": model}
        self._batch = Histogram("lampworks_batch_size", "Sessions refined together.", list(BATCHES), ("model",))
        self._bytes = Gauge("lampworks_kv_bytes", "Bytes of session caches in use.", ("model",))
        self._misses = Counter("lampworks_cache_miss", "Steps of sessions that had no cache here.", ("model",))
        for metric in (self._batch, self._bytes, self._misses):
            metric.set_default_tags(dict(tags))  # Serve adds its own to what it is given

    def batch(self, sessions: int) -> None:
        """A refinement pass."""
        self._batch.observe(sessions)

    def held(self, size_bytes: int) -> None:
        """Caches came or went."""
        self._bytes.set(size_bytes)

    def miss(self) -> None:
        """A step must bring its context."""
        self._misses.inc()
