"""The EMA teacher (method.md, T): parameters and batch-norm buffers follow the student."""

import copy

import torch
from torch import nn


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student that takes no gradient and stays in eval mode."""
    teacher = copy.deepcopy(student).eval()
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher ← decay · teacher + (1 − decay) · student, in a few fused calls; integer buffers are copied."""
    new, old = _tensors(student), _tensors(teacher)
    floats = [(o, n) for o, n in zip(old, new, strict=True) if o.is_floating_point()]
    torch._foreach_lerp_([o for o, _ in floats], [n for _, n in floats], 1 - decay)
    for o, n in zip(old, new, strict=True):
        if not o.is_floating_point():
            o.copy_(n)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
