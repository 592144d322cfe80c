"""The trials of a sweep with Ray Tune: each is an ordinary run, in a process of its own that asks for its own workers."""

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from threestage.config import Config
from threestage.data import storage
from threestage.errors import InputError, NoRoom, StageFailure, UnwritablePlace, reason_of
from threestage.ray_backend.capacity import TRIAL_CPUS
from threestage.ray_backend.connect import quiet_ray_data
from threestage.ray_backend.train import on_cluster
from threestage.run import pipeline
from threestage.run.backend import RunCallbacks
from threestage.run_folder.reuse import parts_elsewhere
from threestage.sweeps.space import Space, total_steps, trial_config
from threestage.sweeps.trials import Trial, TrialStore, curve_of, run_folder, shared_folder, steps_before

METRIC, TIME = "mean_iou", "step"
JUDGED = "judged_mean_iou"  # what the scheduler reads: nothing of a trial's last evaluation, nor of the one that changes nothing

Next = Callable[[], Trial | None]


def run_trials(
    space: Space, config: Config, out: str, store: TrialStore, next_trial: Next, count: int, spent: Callable[[], bool],
    warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Run the trials that `next_trial` gives, at most `count`, until `spent` says that the budget is; then they are interrupted.

    Every change is in the store; nothing is kept by Ray Tune, whose records are pickles. Raises StageFailure when it fails.
    """
    if len(space.stages) > 1:
        _start_actors_of_ray_data()
    plain = {"space": space.model_dump(mode="json"), "base": config.model_dump(mode="json"), "out": out}
    trainable = tune.with_resources(tune.with_parameters(_run_trial, **plain), {"CPU": TRIAL_CPUS})
    with tempfile.TemporaryDirectory() as scratch:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=_Proposals(next_trial),
                scheduler=_scheduler(space, config, store),
                num_samples=count,
                max_concurrent_trials=space.max_concurrent,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                stop=_Budget(spent),
                callbacks=[_Listener(store, warn)],
                failure_config=tune.FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        try:
            tuner.fit()
        except TuneError as error:
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            text = f"the trials were interrupted: {reason[0]}; --resume continues"
            raise StageFailure(text, "sweep/interrupted") from error
        finally:
            store.interrupt()


def _start_actors_of_ray_data() -> None:
    """Ray Data has a few for the whole cluster. Started by a trial's process they would go with it."""
    ray.data.from_items([0]).map(lambda row: row).materialize()


def quieten() -> None:
    """The trial store is the record: no log files, no tables of Ray Tune's own. Call it before threads begin, see
    mlflow_sync.connection.reserve_variables. Trials do not inherit the driver's environment."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # prints less, with verbose=0 nothing
    for library in ("ray.tune", "ray.air"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _scheduler(space: Space, config: Config, store: TrialStore) -> TrialScheduler:
    """ASHA that knows what the trials of an earlier start have scored."""
    if space.scheduler is None:
        return FIFOScheduler()
    scheduler = ASHAScheduler(
        time_attr=TIME,
        metric=JUDGED,
        mode="max",
        grace_period=space.scheduler.grace_steps,
        reduction_factor=space.scheduler.reduction_factor,
        max_t=max(space.scheduler.grace_steps + 1, total_steps(space, config)),
        stop_last_trials=False,
    )
    for trial in store.of("search"):
        if trial.over and not trial.own:
            earlier = SimpleNamespace(trial_id=f"earlier-{trial.number}")  # all that ASHA asks of a trial
            scheduler.on_trial_add(None, earlier)
            judged = trial.curve if trial.score is None else trial.curve[:-1]
            for step, score in judged:
                scheduler.on_trial_result(None, earlier, {TIME: step, JUDGED: score})
    return scheduler


class _Unpickled:
    """Ray Tune pickles itself into its scratch folder, which nobody reads; what belongs to this process stays out of it."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()


class _Proposals(_Unpickled, Searcher):
    """Hands the sweep's next trial to Ray Tune."""

    def __init__(self, next_trial: Next) -> None:
        super().__init__(metric=JUDGED, mode="max")
        self._next_trial = next_trial

    def suggest(self, trial_id: str) -> Any:
        trial = self._next_trial()
        return Searcher.FINISHED if trial is None else {"trial": trial.model_dump(mode="json")}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The trial store has it, and is the searcher's memory."""

    def save(self, checkpoint_path: str) -> None:
        """As above."""


class _Budget(_Unpickled, tune.Stopper):
    def __init__(self, spent: Callable[[], bool]) -> None:
        self._spent = spent

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._spent()


class _Listener(_Unpickled, tune.Callback):
    """Writes what Ray Tune reports into the trial store."""

    def __init__(self, store: TrialStore, warn: Callable[[str], None]) -> None:
        self._store, self._warn = store, warn

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._store.begin(_number(trial))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        number = _number(trial)
        if "warning" in result:
            self._warn(f"trial {number}: {result['warning']}")
        elif "trained" in result:  # else Ray Tune's own last word
            self._store.note(number, result["trained"], result["reused"])
            if "failure" in result:
                self._store.end(number, result["state"], result["failure"])
            else:
                self._store.score(number, int(result[TIME]), float(result[METRIC]))
                if result["finished"]:
                    self._store.end(number, "finished")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._over(_number(trial), None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = str(trial.get_error() or "").strip().splitlines()
        self._over(_number(trial), lines[-1] if lines else "its process was lost")

    def _over(self, number: int, error: str | None) -> None:
        """What has not said itself how it ended was stopped by the scheduler, or lost."""
        if self._store.trial(number).state == "running":
            self._store.end(number, "stopped" if error is None else "failed", error)
        self._store.delete_losing_runs()


def _number(trial: Any) -> int:
    return int(trial.config["trial"]["number"])


def _run_trial(setting: dict[str, Any], space: dict[str, Any], base: dict[str, Any], out: str) -> None:
    """A trial's process: runs the trial's run, and reports each mean IoU on the validation images to Ray Tune as it comes.

    What an earlier try has reported is reported again first, for the scheduler. What fails is reported, not raised: it would
    fail again. A process that is lost is started again by Ray Tune, and its run continues from its last checkpoint.
    """
    quiet_ray_data()
    trial, the_space = Trial.model_validate(setting["trial"]), Space.model_validate(space)
    config = trial_config(the_space, Config.model_validate(base), trial.params, trial.seed)
    storage.configure(config.storage)
    folder, shared = run_folder(out, trial.number), shared_folder(out, trial.seed) if the_space.shared_stages else None
    reporter = _TrialReporter(trial, config, the_space, folder)
    for step, value in trial.curve:
        reporter.score(step, value)
    try:
        on = RunCallbacks(reporter.on_metrics, lambda text: reporter.report({"warning": text}))
        with on_cluster(config, folder, on) as backend:
            pipeline.run(config, folder, backend, on, reuse=shared)
        for step, value in curve_of(folder, the_space.stages, config):
            reporter.score(step, value)
    except (InputError, StageFailure, OSError, ray.exceptions.RayError) as error:
        again = isinstance(error, NoRoom | UnwritablePlace | OSError)
        reporter.parts(failure=" ".join(reason_of(error).split()), state="waiting" if again else "failed")


class _TrialReporter:
    """What a trial's process reports to Ray Tune. Scores are of steps over all searched stages, each reported once."""

    def __init__(self, trial: Trial, config: Config, space: Space, folder: str) -> None:
        self._trial, self._config, self._stages, self._folder = trial, config, space.stages, folder
        self._last = steps_before(config, space.stages)
        self._trained = set(trial.trained)
        self._elsewhere = list[str]()
        self._reported = set[int]()
        self._lock = threading.Lock()

    def report(self, result: dict[str, Any]) -> None:
        with self._lock:  # the pool is looked for in a thread of its own
            tune.report(result)

    def parts(self, **result: Any) -> None:
        """A result with the stages that were trained and the parts that were reused, as far as the store says: an outage costs no
        trial."""
        with contextlib.suppress(OSError, InputError):
            self._elsewhere = sorted(parts_elsewhere(self._folder))
        self.report({"trained": sorted(self._trained), "reused": self._elsewhere, **result})

    def score(self, step: int, value: float) -> None:
        if step not in self._reported:
            self._reported.add(step)
            judged = {} if self._trial.own or step == self._last else {JUDGED: value}
            self.parts(**{TIME: step, METRIC: value}, finished=step == self._last, **judged)

    def on_metrics(self, stage: str, row: Mapping[str, float]) -> None:
        """A row of metrics of the run. The last score counts when the stage's model is there."""
        self._trained.add(stage)
        if METRIC in row and int(stage[-1]) in self._stages:
            step = steps_before(self._config, self._stages, stage) + int(row["step"])
            if step < self._last:
                self.score(step, row[METRIC])
