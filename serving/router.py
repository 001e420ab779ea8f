"""Where a session's steps go: to the replica that has its cache, as long as that lives."""

import math
import time
from collections import Counter, OrderedDict

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RunningReplica
from typing_extensions import override

PLACE_AGAIN = "+"
"""Ends the session id of a step that brings its context: its cache is gone, so it may go where there is room."""
REMEMBERED = 65536
"""Sessions whose replica a router remembers."""
LIVE_S = 60.0
"""A session without a step for this long takes no room."""


class PinningRouter(ConsistentHashRouter):
    """Known sessions stay; others are hashed, past replicas that have their share (consistent hashing with bounded
    loads, Mirrokni et al. 2018). So replicas that are added or lost move only what must move.
    """

    @override
    def initialize_state(self, **kwargs: int) -> None:
        """Serve calls this once, before anything is routed."""
        super().initialize_state(**{"num_fallback_replicas": 1024, **kwargs})
        self._pins: OrderedDict[str, tuple[ReplicaID, float]] = OrderedDict()

    @override
    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks: the session's own replica, then by its hash those with room, then the others."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        session = pending_request.metadata.session_id if pending_request else ""
        if not session or len(ranks) < 2:
            return ranks
        pinned = self._pins.get(session)
        if pinned is not None and pinned[0] in self._replicas:
            return [[self._replicas[pinned[0]]], *ranks]
        loads = self._loads(session.removesuffix(PLACE_AGAIN))
        share = math.ceil((sum(loads.values()) + 1) / len(ranks))
        return sorted(ranks, key=lambda rank: loads[rank[0].replica_id] >= share)

    @override
    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """Serve calls this when a replica has taken a request."""
        session = pending_request.metadata.session_id.removesuffix(PLACE_AGAIN)
        if session:
            self._pins[session] = (replica_id, time.monotonic())
            self._pins.move_to_end(session)
            if len(self._pins) > REMEMBERED:
                self._pins.popitem(last=False)

    def _loads(self, newcomer: str) -> Counter[ReplicaID]:
        """Live sessions of each replica, as far as this router sent them there."""
        since = time.monotonic() - LIVE_S
        loads: Counter[ReplicaID] = Counter()
        for session, (replica, used) in reversed(self._pins.items()):
            if used < since:
                break
            if session != newcomer:
                loads[replica] += 1
        return loads
