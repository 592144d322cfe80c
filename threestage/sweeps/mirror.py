"""A sweep in MLflow, kept up in the background: the sweep's folder is the record, and no store holds a sweep up."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from threestage.errors import InputError
from threestage.registry import Registry, Status, TrialRecord, TrialStatus
from threestage.sweeps.trials import State, Trial

BETWEEN_S = 3.0  # at least so long from one sending to the next
RETRY_S = 30.0  # from a failure to the next try
STATUS: dict[State, TrialStatus] = {
    "waiting": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
}


class Mirror:
    """One parent run for the sweep, one run nested in it per trial; found again by `sweep_key` after a killed driver.

    `params`: of the parent run. `warn` is called from a thread, once each time that the store is lost.
    """

    def __init__(
        self,
        registry: Registry,
        sweep_key: str,
        name: str,
        params: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._registry, self._key, self._name, self._params, self._warn = registry, sweep_key, name, params, warn
        self._parent: str | None = None
        self._pending: dict[int, TrialRecord] = {}
        self._sent: dict[int, TrialRecord] = {}
        self._lost = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="sweep-mirror", daemon=True)
        self._thread.start()

    def update(self, trial: Trial, tags: Mapping[str, str]) -> None:
        """Send a trial's present state, soon; returns at once. What is there already costs nothing."""
        record = self._record(trial, tags)
        with self._changed:
            if self._pending.get(trial.number, self._sent.get(trial.number)) != record:
                self._pending[trial.number] = record
                self._changed.notify_all()

    def close(self, status: Status, summary: Mapping[str, float], artifacts: Mapping[str, str]) -> bool:
        """Send all that is left, the sweep's final values and files (name in the run → URI), and end the parent run.

        False, with a warning, where the store could not be reached.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        try:
            self._send()
            self._registry.close_run(self._key, status, summary, artifacts)
        except Exception as error:
            self._warn(
                f"the sweep is not all in MLflow: {_reason(error)}; the same command with --resume sends the rest"
            )
            return False
        return True

    def _record(self, trial: Trial, tags: Mapping[str, str]) -> TrialRecord:
        about = {
            "sweep": self._key,
            "number": str(trial.number),
            "seed": str(trial.seed),
            "state": trial.state,
            "reason": trial.reason or "",
            "kind": trial.kind,
            **({} if trial.repeats is None else {"repeats": str(trial.repeats)}),
        }
        return TrialRecord(
            sweep_key=self._key,
            sweep_name=self._name,
            number=trial.number,
            params=trial.params,
            curve=trial.curve,
            tags={**tags, **about},
            status=STATUS[trial.state],
        )

    # ---- The thread

    def _work(self) -> None:
        while self._wait_for_work():
            pause = BETWEEN_S
            try:
                self._send()
                self._lost = False
            except Exception as error:  # whatever a store's client throws, the sweep goes on
                pause = RETRY_S
                if not self._lost:
                    self._warn(f"the sweep goes on without MLflow, which is tried again: {_reason(error)}")
                self._lost = True
            self._wait_until_closing(pause)

    def _wait_for_work(self) -> bool:
        """Whether there is something to send; False when the mirror is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closing)
            return not self._closing

    def _wait_until_closing(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=seconds)

    def _send(self) -> None:
        """Send what is pending now, by number; what a failure leaves stays pending."""
        if self._parent is None:
            self._parent = self._registry.open_sweep(self._key, self._name, self._params)
        with self._changed:
            numbers = sorted(self._pending)
        for number in numbers:
            with self._changed:
                record = self._pending.pop(number)
                self._sent.pop(number, None)
            try:
                self._registry.record_trial(self._parent, record)
            except BaseException:
                with self._changed:
                    self._pending.setdefault(number, record)
                raise
            with self._changed:
                self._sent[number] = record


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
