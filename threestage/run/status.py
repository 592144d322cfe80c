"""The state of runs, read from their folders alone: what they do, how far they are, what they have cost."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from threestage.config import STAGES, flatten
from threestage.data import storage
from threestage.data.storage_errors import explain
from threestage.errors import InputError
from threestage.mlflow_sync.connection import redact_tree
from threestage.run_folder import lease
from threestage.run_folder.events import ENDS, Event, read_events
from threestage.run_folder.lease import LeaseObserver
from threestage.run_folder.records import Results, RunSettings, StageResult
from threestage.run_folder.reuse import CONFIG_NAME, resolve_part
from threestage.training.checkpoint import Checkpoints, checkpoint_folder

QUIET_S, QUIET_GAPS = 60.0, 3  # without a sign of progress for longer than both, a run is waiting
MOST_RUNS = 1000
AT_ONCE = 16

State = Literal["running", "waiting", "finished", "failed", "dead", "looking", "damaged"]
"""looking: whether its driver lives is not known yet. damaged: a file of the folder cannot be read, `why` names it."""


@dataclass(frozen=True)
class RunStatus:
    """step, steps: of the stage, or images of the pool. checkpoint_age_s: by the driver's clock. mean_iou: by stage, of the
    running one its last evaluation. device_hours: for how long devices were held, of an older run the time of its steps."""

    uri: str
    name: str
    state: State
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    per_second: float | None = None
    seconds_left: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age_s: float | None = None
    mean_iou: Mapping[str, float] = field(default_factory=dict)
    device_hours: float = 0.0
    driver: str | None = None
    why: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_runs(prefix: str) -> list[str]:
    """The folders of runs: the prefix itself, or those directly below it. Raises InputError where there is none."""
    prefix = storage.absolute(prefix)
    if _is_run(prefix):
        return [prefix]
    names = storage.first_names(prefix, MOST_RUNS)
    folders = [storage.join(prefix, name) for name in names if storage.is_s3(prefix) or name.endswith("/")]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = [folder for folder, is_run in zip(folders, threads.map(_is_run, folders), strict=True) if is_run]
    if not found:
        raise InputError(
            f"{prefix}: no run is there or directly below; give the --out of a run, or its parent", "run/no-run"
        )
    return found


def _is_run(folder: str) -> bool:
    return any(storage.is_file(storage.join(folder, name)) for name in ("split.json", lease.NAME))


def read_statuses(runs: Sequence[str], observer: LeaseObserver, wait: bool = True) -> list[RunStatus]:
    """The status of each run. wait: until it is known which drivers live, which takes up to MISSED beats for those elsewhere."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = list(threads.map(observer.look, runs))
        while wait and any(alive is None for _, alive in found):
            time.sleep(1.0)
            found = list(threads.map(observer.look, runs))
        return list(threads.map(lambda run, seen: _status_or_damage(run, *seen), runs, found))


def _status_or_damage(run: str, holder: lease.Holder | None, alive: bool | None) -> RunStatus:
    """One damaged folder hides no other run."""
    try:
        return read_status(run, holder, alive)
    except (InputError, FileNotFoundError, PermissionError) as error:
        known = explain(None, error) if isinstance(error, OSError) else error
        return RunStatus(run, run.rsplit("/", 1)[-1], "damaged", why=known.message)


def read_status(run: str, holder: lease.Holder | None, alive: bool | None) -> RunStatus:
    """What the folder of a run says; `holder` has its lease, and lives or not."""
    settings = _json(storage.join(run, CONFIG_NAME), RunSettings) or {}
    results = _json(storage.join(run, "results.json"), Results) or {}
    expected = STAGES[: settings.get("stages") or len(results.get("stages", ())) or len(STAGES)]
    events, stages = read_events(run), _Stages.of(run, expected)
    progress = {} if holder is None else holder.progress
    state = _state(holder, alive, bool(results) and set(expected) <= set(results["stages"]), events)
    place = progress if progress.get("stage") else stages.place(settings)
    step, steps, rate = place.get("step"), place.get("steps"), place.get("per_second")
    left = ((steps or 0) - (step or 0)) / rate if rate and state in ("running", "waiting") else None
    return RunStatus(
        uri=run,
        name=settings.get("name") or results.get("name") or run.rsplit("/", 1)[-1],
        state=state,
        stage=None if state == "finished" else place.get("stage"),
        step=step,
        steps=steps,
        per_second=rate or None,
        seconds_left=left,
        checkpoint_step=progress.get("checkpoint_step", stages.checkpoint_step),
        checkpoint_age_s=progress.get("checkpoint_age_s") if alive else None,
        mean_iou=stages.mean_iou,
        device_hours=_device_hours(events, progress) or stages.device_hours(settings),
        driver=None if holder is None else str(holder),
        why=_why(state, events),
    )


def _state(holder: lease.Holder | None, alive: bool | None, finished: bool, events: Sequence[Event]) -> State:
    """The lease decides: where nobody holds one, the folder says how the run ended."""
    if holder is not None:
        if alive is None:
            return "looking"
        if not alive:
            return "dead"
        quiet_s, gap_s = (float(holder.progress.get(key, 0)) for key in ("quiet_s", "usual_gap_s"))
        return "waiting" if quiet_s > max(QUIET_S, QUIET_GAPS * gap_s) else "running"
    if finished:
        return "finished"
    return "failed" if events and events[-1]["kind"] in ENDS else "dead"


def _why(state: State, events: Sequence[Event]) -> str | None:
    """The last word on a run that does not get on."""
    if state in ("running", "finished", "looking") or not events:
        return None
    return events[-1]["text"]


def _device_hours(events: Sequence[Event], progress: Mapping[str, Any]) -> float:
    """Of all drivers that said how long they held their devices, and of the one that holds the lease."""
    return sum(held.get("seconds", 0.0) * held.get("devices", 0.0) for held in (*events, progress)) / 3600


@dataclass(frozen=True)
class _Stages:
    """What the stages of a run have saved. rows: of each that has begun, to its last checkpoint; results: of those that are
    finished."""

    results: Mapping[str, StageResult]
    rows: Mapping[str, Sequence[Mapping[str, float | None]]]
    checkpoint_step: int | None

    @classmethod
    def of(cls, run: str, expected: Sequence[str]) -> "_Stages":
        results, rows, step = dict[str, StageResult](), dict[str, Any](), None
        for stage in expected:
            folder = resolve_part(run, stage)
            if storage.exists(storage.join(folder, "done.json")):
                results[stage] = storage.read_json(storage.join(folder, "result.json"), StageResult)
                rows[stage] = results[stage]["history"]
                continue
            checkpoints = Checkpoints(checkpoint_folder(folder))
            latest = checkpoints.latest()
            if latest is not None:
                rows[stage], step = checkpoints.rows(), latest.step
            break
        return cls(results, rows, step)

    @property
    def mean_iou(self) -> dict[str, float]:
        found = {
            stage: [row["mean_iou"] for row in rows if row.get("mean_iou") is not None]
            for stage, rows in self.rows.items()
        }
        return {stage: float(scores[-1] or 0) for stage, scores in found.items() if scores}

    def place(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Where the run was saved last, in the words of its progress."""
        if not self.rows:
            return {}
        stage, rows = list(self.rows.items())[-1]
        last = rows[-1] if rows else {}
        steps = settings.get(stage, {}).get("steps")
        return {
            "stage": stage,
            "step": int(last.get("step") or 0),
            "steps": steps,
            "per_second": last.get("steps_per_second"),
        }

    def device_hours(self, settings: Mapping[str, Any]) -> float:
        gpus = settings.get("cluster", {}).get("gpus_per_worker")
        of_each = 1 if gpus in (None, 0, "auto") else gpus
        devices = {stage: of_each * (rows[-1].get("workers") or 1) for stage, rows in self.rows.items() if rows}
        return sum(_seconds(self.rows[stage]) * number for stage, number in devices.items()) / 3600


def _seconds(rows: Sequence[Mapping[str, float | None]]) -> float:
    """Of the steps of a history."""
    total = last = 0.0
    for row in rows:
        total += ((row["step"] or 0) - last) * (row.get("step_seconds") or 0)
        last = row["step"] or 0
    return total


def _json(uri: str, shape: Any) -> Any:
    return storage.read_json(uri, shape) if storage.exists(uri) else None


def different_settings(runs: Sequence[str]) -> dict[str, list[Any]]:
    """Dotted keys that do not have the same value in all runs, with the value of each; None where a run has none."""
    found = [flatten(redact_tree(_json(storage.join(run, CONFIG_NAME), RunSettings) or {})) for run in runs]
    keys = sorted({key for settings in found for key in settings} - {"name"})
    table = {key: [settings.get(key) for settings in found] for key in keys}
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}
