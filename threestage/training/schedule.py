"""What changes with the step: learning rate, EMA decay, ramp-up of the consistency loss."""

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from threestage.errors import InputError
from threestage.settings import Settings


class OptimiserSettings(Settings):
    """AdamW, which is Adam without weight decay, as in the paper."""

    algorithm: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or SGD with momentum 0.9 (UniMatch V1)")
    learning_rate: float = Field(3e-5, gt=0, description="learning rate of new layers")
    encoder_learning_rate: float = Field(3e-6, gt=0, description="learning rate of pretrained layers")
    weight_decay: float = Field(0.0, ge=0, description="weight decay, decoupled from the gradient (AdamW); paper: 0")
    decay_norms: bool = Field(True, description="decay norms, biases, class tokens and position embeddings too")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the rate of each ViT block further from the head"
    )
    schedule: Literal["constant", "poly"] = Field(
        "constant", description="schedule of both learning rates: constant (paper), or poly, (1 - t)^0.9"
    )
    warm_up_steps: int = Field(0, ge=0, description="steps of linear warm-up from 0")
    clip_norm: float | None = Field(None, gt=0, description="maximum norm of the whole gradient")


class EmaSettings(Settings):
    """The teacher's decay by step: pairs of (first step, decay), the first at step 0."""

    decay: tuple[tuple[int, float], ...] = Field(((0, 0.99),), description="weight of the old teacher, from a step on")
    warm_up: bool = Field(
        False,
        description="limit the decay at step t to 1 - 1/(t+1), so that short schedules forget the start; paper: false",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        starts = [start for start, _ in self.decay]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise InputError("first steps must rise from 0, e.g. [[0, 0.99], [20000, 0.995]]", "config/invalid-value")
        if any(not 0 <= decay < 1 for _, decay in self.decay):
            raise InputError("every decay must lie in [0, 1)", "config/invalid-value")
        return self


def learning_rate_factor(step: int, steps: int, settings: OptimiserSettings) -> float:
    """Factor in [0,1] on the learning rates at `step` of `steps`: linear warm-up, then constant or (1 - t)^0.9."""
    factor = (1 - step / steps) ** 0.9 if settings.schedule == "poly" else 1.0
    if step < settings.warm_up_steps:
        factor *= (step + 1) / settings.warm_up_steps
    return factor


def ema_decay(step: int, settings: EmaSettings) -> float:
    """The decay of the last pair whose first step has come; with `warm_up` at most 1 - 1/(step + 1)."""
    decay = [decay for start, decay in settings.decay if start <= step][-1]
    return min(decay, 1 - 1 / (step + 1)) if settings.warm_up else decay


def ramp_up(step: int, ramp_up_steps: float) -> float:
    """exp(-5 (1 - t)²) with t = step / ramp_up_steps, then 1; 0 steps mean no ramp (Laine & Aila 2017)."""
    if step >= ramp_up_steps:
        return 1.0
    return math.exp(-5 * (1 - step / ramp_up_steps) ** 2)
