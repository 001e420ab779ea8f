"""How many replicas a world needs: by its live sessions, and by how long their steps wait."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext

SESSIONS, QUEUE = "sessions", "queue_s"
"""What every replica reports (`serving.replica.WorldModel.record_autoscaling_stats`)."""
LONG_QUEUE_S = 0.25
"""A mean wait above this asks for one more replica, however few the sessions are."""


class DesiredReplicas:
    """Ray Serve's controller asks it some ten times a second; Serve itself applies bounds and delays.

    Args:
        sessions_per_replica: how many a replica refines together.
    """

    def __init__(self, sessions_per_replica: int) -> None:
        self.sessions_per_replica = sessions_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The wanted number, 0 when nobody plays; and no state."""
        reported = context.aggregated_metrics or {}
        sessions = sum((reported.get(SESSIONS) or {}).values())
        waits = list((reported.get(QUEUE) or {}).values())
        wanted = math.ceil(round(sessions, 3) / self.sessions_per_replica)
        if waits and max(waits) > LONG_QUEUE_S:
            wanted = max(wanted, context.current_num_replicas + 1)
        if context.total_num_requests > 0:  # calls wait for a first replica, or a prompt is being read
            wanted = max(wanted, 1)
        return wanted, {}
