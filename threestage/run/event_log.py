"""Notes what happens to a run while it works: events in its folder (run_folder/events.py), its progress in its lease.

A thread writes the events. A kill loses those of the last moment; an outage loses none, they are written afterwards.
"""

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from threestage.config import STAGES, Config
from threestage.data import storage
from threestage.errors import InputError, Stopped, reason_of
from threestage.mlflow_sync.connection import Background
from threestage.redaction import redact
from threestage.run.backend import RunCallbacks
from threestage.run.outcome import StageOutcome
from threestage.run_folder import lease
from threestage.run_folder.events import EVENTS_NAME, read_events
from threestage.termination import STOPPED, Terminated
from threestage.training.checkpoint import Checkpoints, checkpoint_folder

MOST_EVENTS = 2000
BETWEEN_S, RETRY_S, END_S = 1.0, 30.0, 30.0


class EventLog:
    """Events of one driver, after those of the drivers before; the newest MOST_EVENTS are kept. is_lost: whether another driver
    has taken the run over, whose events these must not replace."""

    def __init__(self, out: str, is_lost: Callable[[], bool] = lambda: False) -> None:
        self._out = out
        self._is_lost = is_lost
        self._lines = deque[str](maxlen=MOST_EVENTS)
        self._before: list[str] | None = None
        self._writer: Background | None = None

    def note(self, kind: str, text: str, **figures: float) -> None:
        event = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "kind": kind, "text": redact(text), **figures}
        self._lines.append(json.dumps(event, ensure_ascii=False))
        if self._writer is not None:
            self._writer.notify()

    def begin(self) -> None:
        """The run has begun: before, it may be refused, and its folder be another run's."""
        if self._writer is None:
            self._writer = Background("events", self._write, lambda error: None, BETWEEN_S, RETRY_S)
            self._writer.notify()

    def close(self) -> None:
        """Write what is left; a store that does not take it costs the events and nothing else."""
        if self._writer is not None:
            with contextlib.suppress(OSError, InputError):  # a TimeoutError too
                self._writer.close(self._write, END_S)

    def _write(self) -> None:
        if self._is_lost():
            return
        if self._before is None:
            self._before = [json.dumps(event, ensure_ascii=False) for event in read_events(self._out)]
        lines = [*self._before, *list(self._lines)][-MOST_EVENTS:]
        storage.write_bytes(storage.join(self._out, EVENTS_NAME), "".join(f"{line}\n" for line in lines).encode())


class RunProgress:
    """Where a run is, for the lease that others read. Ages are by this process's clock, so no clocks are compared."""

    def __init__(self, out: str, config: Config, devices: float) -> None:
        self._out, self._config, self._devices = out, config, devices
        self._began = self._heard = self._saved = time.monotonic()
        self._gap_s = 0.0
        self._place: dict[str, Any] = {}
        self._checkpoint: tuple[str, int] | None = None

    def on_metrics(self, stage: str, row: Mapping[str, float]) -> None:
        steps = self._config.stage(stage).steps  # type: ignore[arg-type]
        rate = row.get("steps_per_second", 0.0)
        self._moved({"stage": stage, "step": int(row["step"]), "steps": steps, "per_second": rate})

    def on_progress(self, what: str, done: int, total: int) -> None:
        seconds = max(time.monotonic() - self._heard, 1e-9)
        before = self._place["step"] if self._place.get("stage") == what else done
        self._moved({"stage": what, "step": done, "steps": total, "per_second": (done - before) / seconds})

    def _moved(self, place: dict[str, Any]) -> None:
        now = time.monotonic()
        if place["stage"] == self._place.get("stage"):
            self._gap_s = max(now - self._heard, 0.9 * self._gap_s)
        self._heard, self._place = now, place

    def held(self) -> dict[str, float]:
        """For how long this driver has held how many devices."""
        return {"seconds": round(time.monotonic() - self._began, 1), "devices": self._devices}

    def read(self) -> dict[str, Any]:
        """The progress as plain JSON. quiet_s: since the last sign of it; usual_gap_s: between two signs."""
        with contextlib.suppress(OSError, InputError):
            self._look_for_checkpoint()
        now = time.monotonic()
        found = {**self._place, **self.held()}
        found |= {"quiet_s": round(now - self._heard, 1), "usual_gap_s": round(self._gap_s, 1)}
        if self._checkpoint is not None and self._checkpoint[0] == self._place.get("stage"):
            found |= {"checkpoint_step": self._checkpoint[1], "checkpoint_age_s": round(now - self._saved, 1)}
        return found

    def _look_for_checkpoint(self) -> None:
        stage = self._place.get("stage")
        if stage not in STAGES:
            return
        latest = Checkpoints(checkpoint_folder(storage.join(self._out, stage))).latest()
        if latest is not None and (stage, latest.step) != self._checkpoint:
            self._checkpoint, self._saved = (stage, latest.step), time.monotonic()


@contextlib.contextmanager
def noted(
    config: Config, out: str, held: lease.Lease, before: lease.Holder | None, devices: float, on: RunCallbacks
) -> Iterator[RunCallbacks]:
    """The callbacks of a run whose events and progress are noted. before: the dead driver that `held` was taken from."""
    log, progress = EventLog(out, lambda: held.lost is not None), RunProgress(out, config, devices)
    held.progress = progress.read
    if before is not None:
        spent = {key: before.progress[key] for key in ("seconds", "devices") if key in before.progress}
        log.note("lost", f"the driver before ({before}) ended without a word", **spent)
    log.note("started", f"{held}, on {devices:g} device{'s' if devices != 1 else ''}")
    try:
        yield _with_notes(log, progress, on)
        log.note("finished", "all stages are done", **progress.held())
    except (KeyboardInterrupt, Terminated, Stopped) as error:
        texts = {KeyboardInterrupt: "Ctrl-C", Terminated: STOPPED}
        log.note("stopped", texts.get(type(error)) or reason_of(error), **progress.held())
        raise
    except Exception as error:
        log.note("failed", reason_of(error), **progress.held())
        raise
    finally:
        if held.lost is None:
            log.close()


def _with_notes(log: EventLog, progress: RunProgress, on: RunCallbacks) -> RunCallbacks:
    seen = set[str]()

    def begin(what: str) -> None:
        log.begin()
        if what not in seen:
            seen.add(what)
            log.note("stage", f"{what} has begun")

    def on_metrics(stage: str, row: Mapping[str, float]) -> None:
        begin(stage)
        progress.on_metrics(stage, row)
        on.on_metrics(stage, row)

    def on_progress(what: str, done: int, total: int) -> None:
        begin(what)
        progress.on_progress(what, done, total)
        on.on_progress(what, done, total)

    def on_warning(text: str) -> None:
        log.note("warning", text)
        on.on_warning(text)

    def on_stage_done(outcome: StageOutcome) -> None:
        log.begin()
        log.note("stage", f"{outcome.stage} is done: mean IoU {outcome.summary['mean_iou']:.3f}")
        on.on_stage_done(outcome)

    return replace(
        on, on_metrics=on_metrics, on_progress=on_progress, on_warning=on_warning, on_stage_done=on_stage_done
    )
