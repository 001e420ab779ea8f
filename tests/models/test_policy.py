import pytest
import torch

from models.checkpoint import load_model, save_model
from models.config import ModelError, PolicyConfig
from models.cost import cost, parameters
from models.policy import Policy


@pytest.fixture
def policy(transformer):
    cfg = PolicyConfig(height_px=8, width_px=12, frames=3, actions=4, transformer=transformer(layers=4, window=3))
    return Policy(cfg).eval()


def noise(clips, frames, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (clips, frames, 8, 12, 3), dtype=torch.uint8, generator=draw)


def moving(clips, seed):
    """A bar that goes right (0) or left (1) until it turns at an edge (12 px wide, 4 at a time)."""
    draw = torch.Generator().manual_seed(seed)
    place, way = (torch.randint(0, n, (clips,), generator=draw) for n in (3, 2))
    columns, frames, actions = torch.arange(12) // 4, [], []
    for _ in range(4):
        frames.append((columns == place[:, None])[:, None, :, None].expand(clips, 8, 12, 3) * 255)
        way = torch.where(place == 2, 1, torch.where(place == 0, 0, way))
        actions.append(way)
        place = place + 1 - 2 * way
    return {"frames": torch.stack(frames, 1).to(torch.uint8), "actions": torch.stack(actions[:3], 1)}


def test_the_default_is_the_papers():
    found = cost(PolicyConfig(actions=6))
    assert found.parameters == pytest.approx(12 * 4 * 512**2 + 6 * 8 * 512**2, rel=0.02)
    assert found.forward_flops > 2 * 256 * found.parameters * 0.9


def test_what_comes_later_changes_nothing(policy):
    seen = noise(2, 3)
    later = torch.cat((seen[:, :2], noise(2, 1, seed=1)), dim=1)
    assert torch.equal(policy.logits(seen)[:, :2], policy.logits(later)[:, :2])
    assert not torch.equal(policy.logits(seen)[:, 2], policy.logits(later)[:, 2])


def test_the_newest_frames_decide(policy):
    long = noise(5, 7)
    assert torch.equal(policy.act(long), policy.logits(long[:, -3:])[:, -1].argmax(-1))
    assert policy.act(long[:, :1]).shape == (5,)


def test_it_learns_what_a_player_does_and_needs_the_past_for_it(policy):
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    for step in range(100):
        loss, said = policy(moving(32, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    clips = moving(64, 999)
    frames, wanted = clips["frames"][:, :3], clips["actions"][:, 2]
    assert (policy.act(frames) == wanted).float().mean() > 0.95
    middle = (frames[:, 2, 0, 4, 0] == 255).nonzero()[:, 0]  # where the bar alone does not say which way it goes
    alone = policy.act(frames[middle][:, 2:])
    assert (alone == wanted[middle]).float().mean() < 0.9
    assert said["accuracy"] > 0.7  # of all frames, the first of which know no past


def test_saved_and_loaded_it_acts_the_same(policy, tmp_path):
    save_model(tmp_path, policy)
    loaded = load_model(tmp_path, kind="policy")
    assert torch.equal(loaded.logits(noise(4, 3)), policy.logits(noise(4, 3)))
    assert parameters(policy.cfg) == sum(p.numel() for p in policy.parameters())


def test_frames_of_another_size_are_refused(policy):
    with pytest.raises(ModelError, match=r"the policy got frames of shape .* give \(B, T, 8, 12, 3\)"):
        policy.act(torch.zeros(1, 3, 9, 12, 3, dtype=torch.uint8))
    with pytest.raises(ModelError, match="actions is 0"):
        PolicyConfig(actions=0)
