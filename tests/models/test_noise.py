import pytest
import torch

from models.noise import mix, uniform, uniform_for


def test_a_draw_is_a_function_of_its_counters():
    place = torch.arange(50)
    assert torch.equal(uniform(1, 2, place), uniform(1, 2, place))
    assert torch.equal(uniform(1, 2, place)[7], uniform(1, 2, torch.tensor(7)))
    assert not torch.equal(uniform(1, 2, place), uniform(2, 1, place))


def test_draws_are_uniform_and_independent():
    draws = uniform(3, torch.arange(300)[:, None], torch.arange(300))
    assert float(draws.min()) > 0
    assert float(draws.max()) < 1
    counts = torch.histc(draws, 20, 0, 1) / draws.numel()
    assert float((counts - 0.05).abs().max()) < 0.003
    rows = torch.corrcoef(draws[:40].double()) - torch.eye(40)
    assert float(rows.abs().max()) < 0.25
    neighbours = torch.corrcoef(torch.stack((draws[:, :-1].flatten(), draws[:, 1:].flatten())))[0, 1]
    assert abs(float(neighbours)) < 0.02


def test_known_values_never_change():
    """Saved sessions are replayed with these."""
    assert mix(5, torch.tensor([1, 2])).tolist() == [-2199044058265845030, -6382326764478530199]


@pytest.mark.parametrize("shape", [(1,), (3, 4)])
def test_keys_make_samples_independent_of_their_batch(shape):
    keys = torch.tensor([5, -7, 2**62])
    whole = uniform_for(keys, 2, *shape)
    assert whole.shape == (3, *shape)
    for i in range(3):
        assert torch.equal(uniform_for(keys[i : i + 1], 2, *shape)[0], whole[i])
    assert not torch.equal(whole, uniform_for(keys, 3, *shape))
