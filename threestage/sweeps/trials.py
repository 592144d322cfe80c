"""The trials of a sweep as they are kept in its folder: all that a killed sweep needs to go on.

sweep.json                the space, and the configuration that it changes
shared/                   a run: the stages that every trial begins with
trials/0003.json          what was tried and what came of it
runs/0003/                the trial's run; deleted when the trial has lost
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from threestage.config import STAGES, Config, StageName
from threestage.data import storage
from threestage.run_files import StageResult
from threestage.settings import Settings

State = Literal["waiting", "running", "finished", "stopped", "failed"]
TRIALS, RUNS = "trials", "runs"


class Trial(Settings):
    """`params`: value of each searched key that the trial has. `curve`: (step over all searched stages, mean IoU on the
    validation images), rising steps. `seconds`: of all its tries together.

    waiting: not begun, or begun and interrupted. stopped: given up by the scheduler. failed: `reason` says why.
    """

    number: int
    params: dict[str, Any]
    seed: int
    state: State = "waiting"
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    reason: str | None = None
    trained: tuple[str, ...] = ()  # stages
    reused: tuple[str, ...] = ()  # parts that lie in the shared run
    own: bool = False  # it changes nothing of the configuration
    kind: Literal["search", "repeat"] = "search"
    repeats: int | None = None  # number of the trial that it repeats with another seed

    @property
    def over(self) -> bool:
        return self.state in ("finished", "stopped", "failed")

    @property
    def score(self) -> float | None:
        """The mean IoU that counts: at the end of the last searched stage."""
        score = self.curve[-1][1] if self.state == "finished" and self.curve else math.nan
        return score if math.isfinite(score) else None


def run_folder(out: str, number: int) -> str:
    return storage.join(out, RUNS, f"{number:04d}")


def shared_folder(out: str, seed: int) -> str:
    """The run of the stages that all trials with this seed begin with."""
    return storage.join(out, "shared", f"seed{seed}")


def steps_before(config: Config, stages: Sequence[int], stage: str | None = None) -> int:
    """Steps of the searched stages that come before one of them; without one, of all."""
    return sum(config.stage(name).steps for name in _names(stages) if stage is None or name < stage)


def curve_of(run: str, stages: Sequence[int], config: Config) -> list[tuple[int, float]]:
    """The curve of a finished run's searched stages, from its own files."""
    curve = []
    for name in _names(stages):
        history = storage.read_json(storage.join(run, name, "result.json"), StageResult)["history"]
        before = steps_before(config, stages, name)
        curve += [(before + int(row["step"]), float(row["mean_iou"])) for row in history if "mean_iou" in row]
    return curve


def _names(stages: Sequence[int]) -> list[StageName]:
    return [name for number, name in enumerate(STAGES, 1) if number in stages]


def save(out: str, trial: Trial) -> None:
    storage.write_json(storage.join(out, TRIALS, f"{trial.number:04d}.json"), trial.model_dump(mode="json"))


def load_trials(out: str) -> list[Trial]:
    """All trials of a sweep, by number."""
    records = storage.list_files(storage.join(out, TRIALS), recursive=False)
    return sorted((storage.read_json(uri, Trial) for uri in records), key=lambda trial: trial.number)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials, best first; of equals the one that came first."""
    finished = [trial for trial in trials if trial.score is not None]
    return sorted(finished, key=lambda trial: (-(trial.score or 0.0), trial.number))
