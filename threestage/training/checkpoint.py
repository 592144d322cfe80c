"""A stage's state: all that a killed stage needs to go on as if nothing had happened."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from threestage.training.worker import Row

FORMAT = 1
FILE = "state.pt"


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


def save_checkpoint(state: TrainState, folder: Path) -> None:
    """Write the state into an existing folder."""
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
        folder / FILE,
    )


def load_checkpoint(state: TrainState, folder: Path) -> None:
    """Continue from the folder: fills `state` in place. ValueError on a format that this version does not know."""
    saved = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    if saved["format"] != FORMAT:
        raise ValueError(f"{folder / FILE} has checkpoint format {saved['format']}, this version reads {FORMAT}")
    state.student.load_state_dict(saved["student"])
    if state.teacher is not None:
        state.teacher.load_state_dict(saved["teacher"])
    state.optimiser.load_state_dict(saved["optimiser"])
    state.step, state.seconds, state.history = saved["step"], saved["seconds"], saved["history"]
