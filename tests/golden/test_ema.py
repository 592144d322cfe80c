"""The EMA teacher against torch's own AveragedModel: an off-by-one in the decay costs points that nobody can see."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from threestage.training.ema import make_teacher, update_teacher


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def test_parameters_and_buffers_follow_as_in_averaged_model() -> None:
    torch.manual_seed(0)
    student = small_network()
    teacher = make_teacher(student)
    oracle = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    oracle.update_parameters(student)  # the first call copies
    optimiser = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(5):
        optimiser.zero_grad()
        student(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimiser.step()
        update_teacher(teacher, student, 0.9)
        oracle.update_parameters(student)
    for mine, theirs in zip(teacher.state_dict().items(), oracle.module.state_dict().items(), strict=True):
        assert mine[0] == theirs[0]
        if mine[1].is_floating_point():
            torch.testing.assert_close(mine[1], theirs[1])
    batches = teacher.get_buffer("1.num_batches_tracked")
    assert batches == student.get_buffer("1.num_batches_tracked") == 5


def test_teacher_takes_no_gradient_and_evaluates() -> None:
    teacher = make_teacher(small_network())
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
