import pytest
import torch

from models.checkpoint import load_model, save_model
from models.config import ModelError, QualityConfig
from models.cost import quality_cost
from models.quality import QualityNet

SMALL = QualityConfig(frames=3, height_px=16, width_px=24, width=8, groups=4)


def clips(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 24, 3), dtype=torch.uint8, generator=draw)


def test_the_default_is_as_large_as_the_papers():
    parameters, flops = quality_cost(QualityConfig())
    assert parameters == pytest.approx(11.2e6, rel=0.01)
    assert flops > 1e9


def test_a_score_depends_on_the_clip_alone():
    torch.manual_seed(0)
    net, batch = QualityNet(SMALL).eval(), clips(5)
    together, alone = net.score(batch), torch.cat([net.score(clip[None]) for clip in batch])
    assert together.shape == (5,)
    assert torch.allclose(together, alone, atol=1e-6)
    assert len(set(together.tolist())) == 5
    assert torch.allclose(net.score(batch.flip(1)), together, atol=1e-6)  # thumbnails have no order


def test_it_learns_to_tell_bright_from_dark():
    torch.manual_seed(0)
    net = QualityNet(SMALL)
    frames = clips(16) // 2
    frames[::2] += 100
    batch = {"frames": frames, "label": torch.arange(16) % 2 == 0, "weight": torch.ones(16)}
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(20):
        loss, said = net(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert said["accuracy"] == 1
    assert (net.score(frames)[::2] > net.score(frames)[1::2].max()).all()


def test_weights_decide_what_counts():
    net, batch = QualityNet(SMALL), {"frames": clips(2), "label": torch.tensor([1, 0])}
    both = [net({**batch, "weight": torch.tensor(w)})[0].item() for w in ([2.0, 0.0], [0.0, 2.0], [1.0, 1.0])]
    assert both[0] + both[1] == pytest.approx(2 * both[2], rel=1e-5)


def test_saved_and_loaded_it_scores_the_same(tmp_path):
    net = QualityNet(SMALL).eval()
    save_model(tmp_path, net)
    assert torch.equal(load_model(tmp_path, kind="quality").score(clips(4)), net.score(clips(4)))


@pytest.mark.parametrize("wrong", [{"width": 10, "groups": 4}, {"frames": 0}, {"height_px": 8}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ModelError):
        QualityConfig(**wrong)
