"""The trials of a sweep with Ray Tune: each is an ordinary run, in a process of its own that asks for its own workers."""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from threestage.config import Config
from threestage.data import storage
from threestage.errors import InputError, StageFailure
from threestage.on_ray.sweep_room import TRIAL_CPUS
from threestage.on_ray.train import quiet_ray_data, run_on_ray
from threestage.reused import parts_elsewhere
from threestage.sweeps.journal import Journal
from threestage.sweeps.space import Space, total_steps, trial_config
from threestage.sweeps.trials import Trial, curve_of, run_folder, shared_folder, steps_before

METRIC, TIME = "mean_iou", "step"

Next = Callable[[], Trial | None]


def run_trials(
    space: Space, config: Config, out: str, journal: Journal, following: Next, count: int, spent: Callable[[], bool],
    warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Run the trials that `following` gives, at most `count` of them, `space.at_once` at a time, until `spent` says that
    the budget is.

    Every change is in the journal; nothing is kept by Ray Tune, whose records are pickles.
    """
    _quieten()
    scheduler = _scheduler(space, config, journal)
    trainable = tune.with_parameters(
        _run_trial, space=space.model_dump(mode="json"), base=config.model_dump(mode="json"), out=out
    )
    with tempfile.TemporaryDirectory() as scratch:
        tune.Tuner(
            tune.with_resources(trainable, {"CPU": TRIAL_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=_Proposals(following),
                scheduler=scheduler,
                num_samples=count,
                max_concurrent_trials=space.at_once,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                stop=_Budget(spent),
                callbacks=[_Listener(journal, warn, spent)],
                failure_config=tune.FailureConfig(max_failures=max(0, config.cluster.max_failures)),
            ),
        ).fit()


def _quieten() -> None:
    """The journal is the record: no log files, no tables of Ray Tune's own. What a driver sets, its trials inherit not."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # prints less, with verbose=0 nothing
    for library in ("ray.tune", "ray.air"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _scheduler(space: Space, config: Config, journal: Journal) -> TrialScheduler:
    """ASHA that knows what the trials of an earlier start have scored."""
    if space.scheduler is None:
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        grace_period=space.scheduler.grace_steps,
        reduction_factor=space.scheduler.reduction_factor,
        max_t=max(space.scheduler.grace_steps + 1, total_steps(space, config) - 1),  # no rung at the very end
        stop_last_trials=False,
    )
    for trial in journal.of("search"):
        if trial.state in ("finished", "stopped", "failed"):
            earlier = _Earlier(f"earlier-{trial.number}")
            scheduler.on_trial_add(None, earlier)
            for step, score in trial.curve:
                scheduler.on_trial_result(None, earlier, {TIME: step, METRIC: score})
    return scheduler


class _Earlier:
    """All that ASHA asks of a trial."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class _Unpickled:
    """Ray Tune pickles itself into its scratch folder, which nobody reads; what belongs to this process stays out of it."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class _Proposals(_Unpickled, Searcher):
    """Hands the sweep's next trial to Ray Tune."""

    def __init__(self, following: Next) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._following = following

    def suggest(self, trial_id: str) -> Any:
        trial = self._following()
        return Searcher.FINISHED if trial is None else {"trial": trial.model_dump(mode="json")}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        """The journal has it."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class _Budget(_Unpickled, tune.Stopper):
    def __init__(self, spent: Callable[[], bool]) -> None:
        self._spent = spent

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._spent()


class _Listener(_Unpickled, tune.Callback):
    """Writes what Ray Tune tells into the journal."""

    def __init__(self, journal: Journal, warn: Callable[[str], None], spent: Callable[[], bool]) -> None:
        self._journal, self._warn, self._spent = journal, warn, spent

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._journal.begin(_number(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        if "warning" in result:
            self._warn(f"trial {_number(trial)}: {result['warning']}")
        elif "failure" in result:
            self._journal.end(_number(trial), "failed", result["failure"])
        elif METRIC in result:
            step, score = int(result[TIME]), float(result[METRIC])
            self._journal.score(_number(trial), step, score, result["trained"], result["reused"])
            if result["finished"]:
                self._journal.end(_number(trial), "finished")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._over(_number(trial), None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = str(trial.get_error() or "its process was lost").strip().splitlines()
        self._over(_number(trial), lines[-1] if lines else "its process was lost")

    def _over(self, number: int, error: str | None) -> None:
        """What has not said itself how it ended was interrupted by the budget, stopped by the scheduler, or lost."""
        if self._journal.state(number) == "running":
            if error is not None:
                self._journal.end(number, "failed", error)
            elif self._spent():
                self._journal.end(number, "waiting")
            else:
                self._journal.end(number, "stopped")
        self._journal.forget()


def _number(trial: Any) -> int:
    return int(trial.config["trial"]["number"])


def _run_trial(setting: dict[str, Any], space: dict[str, Any], base: dict[str, Any], out: str) -> None:
    """A trial's process: runs the trial's run, and tells Ray Tune each mean IoU on the validation images as it comes.

    What an earlier try has reported is said again first, for the scheduler. What fails is told, not raised: it would fail
    again. A process that is lost is started again by Ray Tune, and its run goes on from its last checkpoint.
    """
    quiet_ray_data()
    trial, the_space = Trial.model_validate(setting["trial"]), Space.model_validate(space)
    config = trial_config(the_space, Config.model_validate(base), trial.params, trial.seed)
    storage.configure(config.storage)
    folder, shared = run_folder(out, trial.number), shared_folder(out, trial.seed) if the_space.shared_stages else None
    said, lock = set[int](), threading.Lock()
    trained: set[str] = set(trial.trained)

    def tell(result: dict[str, Any]) -> None:
        with lock:  # the pool is looked for in a thread of its own
            tune.report(result)

    def say(step: int, score: float, finished: bool = False) -> None:
        if step not in said or finished:
            said.add(step)
            reused = sorted(parts_elsewhere(folder))
            tell({TIME: step, METRIC: score, "finished": finished, "trained": sorted(trained), "reused": reused})

    def show(stage: str, row: Mapping[str, float]) -> None:
        trained.add(stage)
        if METRIC in row and int(stage[-1]) in the_space.stages:
            say(steps_before(config, the_space.stages, stage) + int(row["step"]), row[METRIC])

    def warn(text: str) -> None:
        tell({"warning": text})

    for step, score in trial.curve:
        say(step, score)
    try:
        run_on_ray(config, folder, show, warn, reuse=shared)
    except (InputError, StageFailure, OSError, ray.exceptions.RayError) as error:
        tell({"failure": " ".join(str(error).split()) or type(error).__name__})
        return
    curve = curve_of(folder, the_space.stages, config)
    for step, score in curve[:-1]:
        say(step, score)
    say(*curve[-1], finished=True)
