"""A stage's state: all that a killed stage needs to go on as if nothing had happened."""

import io
from dataclasses import dataclass, field
from typing import IO

import torch
from torch import nn

from threestage.training.worker import Row

FORMAT = 1


@dataclass
class TrainState:
    """Everything that changes while a stage trains. Random state is not among it: draws depend on the step alone."""

    student: nn.Module
    teacher: nn.Module | None
    optimiser: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[Row] = field(default_factory=list)

    @property
    def shipped(self) -> nn.Module:
        """The network that the stage delivers: the teacher where there is one."""
        return self.student if self.teacher is None else self.teacher


def save_checkpoint(state: TrainState, file: IO[bytes]) -> None:
    """Write the state into an open file."""
    torch.save(
        {
            "format": FORMAT,
            "student": state.student.state_dict(),
            "teacher": None if state.teacher is None else state.teacher.state_dict(),
            "optimiser": state.optimiser.state_dict(),
            "step": state.step,
            "seconds": state.seconds,
            "history": state.history,
        },
        file,
    )


def load_checkpoint(state: TrainState, content: bytes) -> None:
    """Continue from a checkpoint: fills `state` in place. ValueError on a format that this version does not know."""
    saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if saved["format"] != FORMAT:
        raise ValueError(f"the checkpoint has format {saved['format']}, this version reads {FORMAT}")
    state.student.load_state_dict(saved["student"])
    if state.teacher is not None:
        state.teacher.load_state_dict(saved["teacher"])
    state.optimiser.load_state_dict(saved["optimiser"])
    state.step, state.seconds, state.history = saved["step"], saved["seconds"], saved["history"]
