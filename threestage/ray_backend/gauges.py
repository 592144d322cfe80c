"""What Prometheus can read of a stage: metrics named ray_threestage_…, on the metrics port of each worker's node."""

from collections.abc import Mapping
from functools import cache

from ray.util.metrics import Counter, Gauge

STEP, SECONDS_IN_PHASE, UNSAVED_SECONDS = "step", "seconds_in_phase", "unsaved_seconds"
IMAGES_READ, IMAGES_REJECTED = "images_read", "images_rejected"


def metric_name(name: str) -> str:
    """Of a figure such as kept_share/consistency; Ray puts ray_ before it, and _total behind a counter's."""
    return f"threestage_{name.replace('/', '_')}"


class StageGauges:
    """One series for each rank. Ray drops a value that was not set again for some seconds, so every beat sets all."""

    def __init__(self, tags: dict[str, str]) -> None:
        self._tags = tags
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name not in self._gauges:
                about = f"{name} of a stage"  # without a description Ray exports nothing
                self._gauges[name] = Gauge(metric_name(name), about, tuple(self._tags))
            self._gauges[name].set(value, self._tags)


def count_images(run: str, stage: str, read: int, rejected: int) -> None:
    """Add to this node's counters of the unlabelled images that were read, the rejected ones included."""
    for name, number in ((IMAGES_READ, read), (IMAGES_REJECTED, rejected)):
        if number:
            _counter(name).inc(number, {"run": run, "stage": stage})


@cache
def _counter(name: str) -> Counter:
    return Counter(metric_name(name), f"{name} by a stage's stream", ("run", "stage"))
