import pytest

from infra.config import UserError
from infra.plan import DEVICES, TrainingPlan


def plan(**changes):
    base = dict(parameters=10_100_000_000, frame_flops=1e13, frames=16, tokens=920, activation_bytes=2e9, batch=512,
                micro_batch=2, steps=125_000, workers=8)  # fmt: skip
    return TrainingPlan(**{**base, **changes})


def test_sharding_lowers_memory_stage_by_stage_and_worker_by_worker():
    sizes = [plan().state_bytes(zero) for zero in range(4)]
    assert sizes[1] > sizes[2] > sizes[3]
    assert sizes[0] == 16 * 10.1e9
    assert plan(workers=64).state_bytes(3) == pytest.approx(plan().state_bytes(3) / 8)
    assert plan(workers=1).state_bytes(1) == 20 * 10.1e9


def test_tokens_operations_and_hours_follow_from_the_settings():
    assert plan().seen_tokens == pytest.approx(942e9, rel=1e-3)
    assert plan().flops == 1e13 * 16 * 512 * 125_000
    assert plan(workers=64).hours(DEVICES["h200"], 0.4) == pytest.approx(plan().hours(DEVICES["h200"], 0.4) / 8)


def test_what_cannot_fit_is_refused_with_the_stage_that_would():
    with pytest.raises(UserError, match="needs 103 GB at --zero 1.* has 80 GB: use --zero 2"):
        plan(workers=64, activation_bytes=1e10).check(1, 80e9, "one H100")
    with pytest.raises(UserError, match="use more workers"):
        plan(workers=1).check(3, 80e9, "one H100")
    plan(workers=64).check(3, 80e9, "one H100")


def test_the_dry_run_says_what_fits():
    said = plan(workers=8).lines(DEVICES["h100"], 0.4)
    assert [line.rsplit("| ", 1)[1] for line in said if line.startswith("ZeRO")] == ["does not fit"] * 2 + ["fits"] * 2
    assert "batch 512 = 8 workers x 2 windows x 32 accumulated" in said
    assert any("8 x H100 at 40% of peak" in line for line in said)
