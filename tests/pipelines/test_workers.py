from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from infra.config import UserError
from pipelines.elastic import Sharing
from pipelines.train_config import TrainConfig
from pipelines.workers import sentence

JOB = SimpleNamespace(config=TrainConfig(max_failures=2), folder="runs/x")


def failed(*errors):
    return sentence(JOB, WorkerGroupError("", dict(enumerate(errors))))


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --micro-batch, raise --zero, or give"),
        (OSError(28, "No space left on device"), "free some space and give the same command again"),
        (ActorDiedError(), "give the same command again"),
    ],
)
def test_what_can_not_be_helped_is_one_sentence(error, hint):
    said = str(failed(error, error))
    assert said.startswith("training failed with ")
    assert hint in said and "(--max-failures 2)" in said and "checkpoints are kept in runs/x" in said
    assert "\n" not in said and said.count(type(error).__name__) == 1


def test_a_workers_own_sentence_is_passed_on():
    own = UserError("no room for the checkpoint")
    assert failed(RuntimeError("x"), UserExceptionWithTraceback(own, "Traceback ...")) is own


@pytest.mark.parametrize(("room", "workers"), [(1, 1), (2, 2), (3, 2), (5, 4), (7, 4), (8, 8), (20, 8), (0, 0)])
def test_an_elastic_range_is_kept_to_numbers_that_share_a_step(room, workers):
    policy = Sharing(ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1}))
    policy.shares = 8
    assert policy._count_possible_workers({f"node{n}": {"CPU": 1.2} for n in range(room)}) == workers
