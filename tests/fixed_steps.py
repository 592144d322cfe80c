"""Stage 2's steps on batches made beforehand, for tests of the loop and of its workers."""

from dataclasses import dataclass

import torch
from torch import nn

from tests.narrow_resnet import NAME as NARROW
from threestage.models.network import Network, build_network
from threestage.models.settings import NetworkSettings
from threestage.training.checkpoint import TrainState
from threestage.training.ema import make_teacher
from threestage.training.loop import make_scaler
from threestage.training.step import StepInputs

CLASSES, SIDE = 3, 16
WEIGHTS = {"supervised_loss": 0.5, "consistency_loss": 0.25, "pseudo_mask_loss": 0.25}


@dataclass
class FixedSteps:
    """The inputs of a step as a function of the step alone: a worker's share of 2 labelled and 4 unlabelled images."""

    rank: int = 0
    workers: int = 1
    dtype: torch.dtype = torch.float32
    waited: float = 0.0

    def draw(self, step: int) -> StepInputs:
        random = torch.Generator().manual_seed(step)
        image = torch.rand(6, 3, SIDE, SIDE, generator=random).to(self.dtype)
        masks = torch.randint(0, CLASSES, (3, 6, SIDE, SIDE), generator=random)
        masks[torch.rand(masks.shape, generator=random) < 0.4] = 255
        labelled = [*range(self.rank, 2, self.workers)]
        every = [*labelled, *range(2 + self.rank, 6, self.workers)]
        targets = {
            "supervised_loss": masks[0][labelled],
            "consistency_loss": masks[1][every],
            "pseudo_mask_loss": masks[2][every],
        }
        return StepInputs(image[every], targets, WEIGHTS, tuple(f"image{i}" for i in every))


def network() -> Network:
    """With frozen batch norm, whose statistics are as timm makes them."""
    return build_network(NetworkSettings(encoder=NARROW, dilations=(1, 2)), CLASSES, "branch", 0)


def new_state(student: nn.Module | None = None, precision: str = "float32") -> TrainState:
    student = student or network()
    learnt = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW([{"params": learnt, "lr": 1e-3, "initial_lr": 1e-3}])
    return TrainState(student, make_teacher(student), optimiser, make_scaler(precision, torch.device("cpu")))
