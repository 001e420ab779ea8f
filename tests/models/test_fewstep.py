import copy

import pytest
import torch

from models.config import ModelError
from models.fewstep import Distillation


def batch_of(count: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Frames of one repeated token that goes up by the action: easy to learn, and wrong when tokens disagree."""
    g = torch.Generator().manual_seed(seed)
    actions = torch.randint(0, 3, (count, 3), generator=g)
    first = torch.randint(0, 16, (count, 1), generator=g)
    frames = torch.cat((first, first + actions.cumsum(1)), dim=1) % 16
    return {
        "tokens": frames[..., None].expand(-1, -1, 9).contiguous(),
        "actions": actions,
        "key": torch.arange(count) + 100 * seed,
    }


def train(model, steps: int, rate: float) -> None:
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, rate)
    for step in range(steps):
        loss, _ = model.train()(batch_of(seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_student_learns_what_its_teacher_draws(make_dynamics):
    """Also where the teacher is wrong about the data: its draws are the target."""
    teacher = make_dynamics(transformer={"width": 32, "layers": 4})
    train(teacher, 40, 1e-2)
    with torch.no_grad():  # a habit that the data does not have
        teacher.head.bias[3] += 4
    student = make_dynamics(transformer={"width": 32, "layers": 4})
    distillation = Distillation(teacher, student, steps=2, teacher_steps=4)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    train(distillation, 50, 1e-2)
    batch = batch_of(32, 999)
    taught = distillation.teach(batch["tokens"], batch["actions"], batch["key"])
    share = (taught == 3).double().mean()
    student.eval()
    window = batch["tokens"].clone()
    window[:, -1] = student.mask_token
    with torch.no_grad():
        believed = student.logits(window, batch["actions"])[:, -1].softmax(-1)[..., 3].mean()
    assert share > 0.3
    assert float(believed) == pytest.approx(float(share), abs=0.2)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not [n for n, _ in distillation.named_parameters() if not n.startswith("student.")]


def test_what_is_shown_comes_from_the_key_alone(make_dynamics):
    distillation = Distillation(make_dynamics(), copy.deepcopy(make_dynamics()), steps=2, teacher_steps=4)
    batch = batch_of(8)
    assert torch.equal(distillation(batch)[0], distillation(batch)[0])
    order = distillation.order(batch["key"])
    assert (order.sort(1).values == torch.arange(9)).all()
    assert len(order.unique(dim=0)) > 2


def test_unfit_pairs_are_refused(make_dynamics):
    with pytest.raises(ModelError, match="9 tokens of 16 codes, the student 9 of 8"):
        Distillation(make_dynamics(), make_dynamics(vocabulary=8))
    with pytest.raises(ModelError, match="student has 25 steps, the teacher 25"):
        Distillation(make_dynamics(), make_dynamics(), steps=25)
