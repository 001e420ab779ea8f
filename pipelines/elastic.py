"""Ray Train's elastic range, kept to the numbers of workers that can share a step; reaches into Ray 2.60's insides."""

from typing import Any

from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.torch.torch_trainer import TorchTrainer
from typing_extensions import override


class Sharing(ElasticScalingPolicy):
    """As many workers as there is room for and as divide a step's micro-batches.

    Attributes:
        shares: micro-batches of a step.
    """

    shares: int

    @override
    def _count_possible_workers(self, reserved_resources: Any) -> int:
        """The largest number of workers that can share a step; 0 if none can."""
        most = super()._count_possible_workers(reserved_resources)
        return next((count for count in range(most, 0, -1) if self.shares % count == 0), 0)


class Trainer(TorchTrainer):
    """TorchTrainer whose elastic range has the numbers of workers that divide `shares`.

    Attributes:
        shares: micro-batches of a step.
    """

    shares = 1

    @override
    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        policy = settings["scaling_policy"]
        if isinstance(policy, ElasticScalingPolicy):
            settings["scaling_policy"] = sharing = Sharing(policy.scaling_config)
            sharing.shares = self.shares
        return super()._initialize_and_run_controller(**settings)
