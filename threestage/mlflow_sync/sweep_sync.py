"""A sweep in MLflow, kept up in the background: the sweep's folder is the record, and no store holds a sweep up."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from threestage.errors import reason_of
from threestage.mlflow_sync.client import Registry
from threestage.mlflow_sync.connection import Background
from threestage.mlflow_sync.records import Status, TrialRecord, TrialStatus
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


class SweepSync:
    """One parent run for the sweep, one run nested in it per trial; found again by `sweep_key` after a killed driver.

    `connect` is called once there is something to send, until the store answers. `params`: of the parent run. `warn` is
    called from a thread, once each time that the store is lost.
    """

    def __init__(
        self,
        connect: Callable[[], Registry],
        sweep_key: str,
        name: str,
        params: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._connect, self._key, self._name, self._params, self._warn = connect, sweep_key, name, params, warn
        self._parent: str | None = None
        self._wanted: dict[int, TrialRecord] = {}
        self._sent: dict[int, TrialRecord] = {}
        self._background = Background("sweep-mirror", self._send, self._say_lost, BETWEEN_S, RETRY_S)

    @cached_property
    def _registry(self) -> Registry:
        return self._connect()

    def update(self, trial: Trial, tags: Mapping[str, str]) -> None:
        """Send a trial's present state, soon; returns at once. What is there already costs nothing."""
        record = self._record(trial, tags)
        if self._wanted.get(trial.number) != record:
            self._wanted[trial.number] = record
            self._background.notify()

    def close(self, status: Status, summary: Mapping[str, float], artifacts: Mapping[str, str]) -> bool:
        """Send all that is left, the sweep's final values and files (name in the run → URI), and end the parent run.

        False, with a warning, where the store could not be reached.
        """

        def finish() -> None:
            self._send()
            self._registry.close_run(self._key, status, summary, artifacts)

        try:
            self._background.close(finish)
        except Exception as error:
            self._warn(
                f"the sweep is not all in MLflow: {reason_of(error)}; the same command with --resume sends the rest"
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

    def _say_lost(self, error: Exception) -> None:
        self._warn(f"the sweep continues without MLflow and retries: {reason_of(error)}")

    def _send(self) -> None:
        """Send what is not sent, by number; what a failure leaves is sent the next time."""
        if self._parent is None:
            self._parent = self._registry.open_sweep(self._key, self._name, self._params)
        for number, record in sorted(self._wanted.copy().items()):
            if self._sent.get(number) != record:
                self._registry.record_trial(self._parent, record)
                self._sent[number] = record
