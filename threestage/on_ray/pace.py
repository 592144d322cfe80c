"""How fast the loop turns that runs a stream. Ray sends this class with a stream's settings to every process that reads for it:
those import no torch."""

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

STEP_SECONDS = 0.1


class Unhurried(ExecutionCallback):
    """Without it the loop that runs a stream (Ray 2.60) never pauses while it has nothing to do but to wait until the training
    has taken what is there, and keeps a core busy."""

    def __init__(self) -> None:
        self._last_step = time.monotonic()

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(max(0.0, self._last_step + STEP_SECONDS - time.monotonic()))
        self._last_step = time.monotonic()
