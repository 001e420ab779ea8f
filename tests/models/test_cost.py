"""Counted costs equal what torch counts while the models run."""

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.cost import ceiling_flops, cost, memory_bytes, parameters


@pytest.mark.parametrize("part", ["tokenizer", "actions", "dynamics"])
def test_parameters_are_those_of_the_real_model(make_world, part):
    model = getattr(make_world(), part)
    assert parameters(model.cfg) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("mode", ["additive", "prepended"])
@pytest.mark.parametrize("attention", ["st", "full"])
def test_operations_are_those_that_torch_counts(make_dynamics, mode, attention):
    # torch counts masked pairs of frames too, so compare on windows of one frame, where there are none
    model = make_dynamics(action_mode=mode, transformer={"layers": 3, "attention": attention, "window": 1}).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.logits(torch.zeros(1, 1, 9, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64))
    assert cost(model.cfg).cached_flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_cache_values_are_those_of_the_real_cache(make_dynamics):
    model = make_dynamics(transformer={"layers": 4, "kv_heads": 1})
    caches = model.transformer.caches(1, 9, model.cfg.frames)
    assert cost(model.cfg).cache_values * 4 == sum(c.slot_bytes for c in caches if c is not None)


def test_the_ceiling_is_what_products_reach_and_bounds_a_model():
    x = torch.ones(256, 256)
    began = time.perf_counter()
    for _ in range(20):
        x @ x
    slower = 20 * 2 * 256**3 / (time.perf_counter() - began)
    assert 0.2 * slower < ceiling_flops("cpu") < 1e14
    assert memory_bytes("cpu") > 50e6
