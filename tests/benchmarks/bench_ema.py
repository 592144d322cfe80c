"""The teacher's update against a loop over parameters and torch's AveragedModel: CPU seconds, in turns within one run.

python -m tests.benchmarks.bench_ema [--encoder NAME …] [--rounds 20] [--json FILE]
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.benchmarks.measure import report
from tests.benchmarks.on_device import clock
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings
from threestage.training.ema import make_teacher, update_teacher
from threestage.training.worker import default_device

DECAY = 0.99


@torch.no_grad()
def one_by_one(teacher: nn.Module, student: nn.Module) -> None:
    """As it is often written: tensor after tensor."""
    pairs = (
        *zip(teacher.parameters(), student.parameters(), strict=True),
        *zip(teacher.buffers(), student.buffers(), strict=True),
    )
    for old, new in pairs:
        if old.is_floating_point():
            old.mul_(DECAY).add_(new, alpha=1 - DECAY)
        else:
            old.copy_(new)


def measure(encoder: str, rounds: int) -> dict[str, Any]:
    device = default_device()
    student = build_network(NetworkSettings(encoder=encoder, batch_norm="live"), 19, "branch").to(device)
    teacher = make_teacher(student)
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    averaged.update_parameters(student)  # the first call copies
    ways: dict[str, Callable[[], None]] = {
        "ours": lambda: update_teacher(teacher, student, DECAY),
        "loop": lambda: one_by_one(teacher, student),
        "AveragedModel": lambda: averaged.update_parameters(student),
    }
    now, seconds = clock(device), {name: list[float]() for name in ways}
    for _ in range(rounds + 1):
        for name, act in ways.items():
            began = now()
            act()
            seconds[name].append(now() - began)
    ms = {name: 1000 * median(taken[1:]) for name, taken in seconds.items()}
    return {
        "network": encoder,
        "tensors": len([*student.parameters(), *student.buffers()]),
        **{f"{name}, ms": value for name, value in ms.items()},
        "loop / ours": ms["loop"] / ms["ours"],
        "AveragedModel / ours": ms["AveragedModel"] / ms["ours"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", default=["mobilenetv2_100", "resnet101"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(encoder, options.rounds) for encoder in options.encoder]
    report(f"the teacher's update on {default_device().type}", rows, options.json)


if __name__ == "__main__":
    main()
