"""`threestage sweep` in this process, with stand-ins for Ray, Ray Tune and MLflow: the one file of these tests that knows
the inside of the package."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.runs import run_local
from threestage.config import Config
from threestage.run.backend import RunCallbacks
from threestage.run.local_backend import LocalBackend
from threestage.sweeps.space import Space, trial_config
from threestage.sweeps.trials import Trial, TrialStore, curve_of, run_folder, shared_folder


class NoMlflow:
    def __init__(self, *given: Any) -> None:
        pass

    def update(self, *given: Any) -> None:
        pass

    def close(self, *given: Any) -> None:
        pass


class Trials:
    """Runs trials one after the other. `ends`: by number, the reason of a trial that fails, or what is raised when it begins."""

    def __init__(self, ends: Mapping[int, str | BaseException]) -> None:
        self.ends = ends
        self.begun: list[int] = []
        self.shared: list[str] = []

    def run(
        self, space: Space, config: Config, out: str, journal: TrialStore, following: Callable[[], Trial | None], count: int,
        over: Callable[[], bool], warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        while not over() and (trial := following()) is not None:
            self.begun.append(trial.number)
            journal.begin(trial.number)
            end = self.ends.get(trial.number)
            if isinstance(end, BaseException):
                raise end
            if end is not None:
                journal.end(trial.number, "failed", end)
                continue
            settings, folder = trial_config(space, config, trial.params, trial.seed), run_folder(out, trial.number)
            run_local(settings, folder, lambda stage, row: None, warn, reuse=shared_folder(out, trial.seed))
            journal.note(trial.number, [f"stage{number}" for number in space.stages], ["pseudo_masks1", "stage1"])
            for step, score in curve_of(folder, space.stages, settings):
                journal.score(trial.number, step, score)
            journal.end(trial.number, "finished")

    @contextlib.contextmanager
    def on_cluster(self, config: Config, out: str, on: RunCallbacks) -> Iterator[LocalBackend]:
        """For what all trials share."""
        self.shared.append(Path(out).name)
        yield LocalBackend(config, on)


@contextlib.contextmanager
def without_ray(ends: Mapping[int, str | BaseException] = {}) -> Iterator[Trials]:
    """Sweeps inside it run here; gives what they run."""
    trials = Trials(ends)

    def nothing(*given: Any, **named: Any) -> None:
        return None

    stand_ins: dict[str, Any] = {
        "threestage.ray_backend.connect.connected": lambda *given: contextlib.nullcontext(),
        "threestage.ray_backend.train.warn_of_traps": nothing,
        "threestage.ray_backend.train.on_cluster": trials.on_cluster,
        "threestage.ray_backend.sweep.run_trials": trials.run,
        "threestage.ray_backend.sweep.quieten": nothing,
        "threestage.sweeps.sweep.plan_sweep": nothing,
        "threestage.cli.progress.SweepProgress.plan": nothing,
        "threestage.sweeps.sweep.open_registry": nothing,
        "threestage.sweeps.sweep.SweepSync": NoMlflow,
    }
    with contextlib.ExitStack() as patches:
        for name, stand_in in stand_ins.items():
            patches.enter_context(patch(name, stand_in))
        yield trials
