"""`threestage forecast`: what more labels would bring, from supervised models that learn a part of the labels of a run.

OUT/forecast.json          what was measured, and the forecast
OUT/models/part1of4/ …     a run each: stage 1 with a part of the labels; what is done is kept, so the same command continues
"""

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from threestage.config import STAGES, changed, stage_keys
from threestage.data import storage
from threestage.data.outputs import FORECAST, FORECAST_MARK, claim
from threestage.errors import InputError, Warn
from threestage.run.run import side_run
from threestage.run_folder.folder import RunFolder
from threestage.run_folder.records import StageInputs, StageResult
from threestage.selection.image_lists import Progress, begin_list
from threestage.selection.learning_curve import ForecastScore, LearningCurve
from threestage.selection.supervised import Examined, examined_run, watched
from threestage.settings import Settings

PARTS = ((1, 4), (2, 4), (3, 4), (1, 2), (2, 2), (1, 1))
"""The labels that the models learn: the first quarter of them …, all."""
LEAST_LABELS = 8


class ForecastSettings(Settings):
    """`labels`: how many are asked about; None: twice as many as there are. `steps`: of each model, None: those of stage 1."""

    labels: tuple[int, ...] = Field((), description="ascending")
    steps: int | None = Field(None, ge=1)


class Measured(Settings):
    """A model. `hours`: of training."""

    labels: int
    mean_iou: float
    hours: float


class ForecastReport(Settings):
    """`labels`: of the run. `measured`: models with parts of them, the last one with all; `forecast`: with more. `hours`: of
    training, of all models; `run_hours`: of the stages of the run that have ended, which more labels do not change."""

    out: str
    run: str
    labels: int
    measured: tuple[Measured, ...]
    forecast: tuple[ForecastScore, ...]
    hours: float
    run_hours: float


def forecast(
    run: str,
    out: str,
    settings: ForecastSettings,
    local: bool = True,
    address: str | None = None,
    progress: Progress = lambda what, done, total: None,
    warn: Warn = print,
) -> ForecastReport:
    """Fit the learning curve of a run's stage 1 and write it into the folder `out`.

    The models are trained in this process (`local`), or on Ray, on the cluster at `address`. Raises InputError where the run has
    not begun or has too few labels, where `out` holds something else, and as `threestage run` does.
    """
    run, out = storage.absolute(run), storage.absolute(out)
    examined = examined_run(run, address, settings.steps)
    labels = len(examined.split.labelled)
    if labels < LEAST_LABELS:
        raise InputError(
            f"{run}: has {labels} labels, a forecast needs {LEAST_LABELS}; label more images",
            "next/too-few-to-forecast",
        )
    claim(out, FORECAST)
    record: dict[str, Any] = {"run": run, "shares": [f"{number}/{of}" for number, of in PARTS], "steps": settings.steps}
    begin_list(out, FORECAST_MARK, record)
    models = [_Model(examined, out, number, of) for number, of in PARTS]
    measured = tuple(model.measured(local, progress, warn) for model in models)
    curve = LearningCurve.fit([one.labels for one in measured], [one.mean_iou for one in measured])
    report = ForecastReport(
        out=out,
        run=run,
        labels=labels,
        measured=measured,
        forecast=tuple(curve.at(number) for number in settings.labels or (2 * labels,)),
        hours=sum(one.hours for one in measured),
        run_hours=_hours_of(run),
    )
    storage.write_json(storage.join(out, FORECAST_MARK), record | report.model_dump(mode="json"))
    return report


@dataclass(frozen=True)
class _Model:
    """Learns part `number` of so many (`of`) of the labels."""

    examined: Examined
    out: str
    number: int
    of: int

    def measured(self, local: bool, progress: Progress, warn: Warn) -> Measured:
        """Train it, as far as that is not done; the model of all labels may be the run's own."""
        every, config = self.examined.split.labelled, self.examined.config
        count = len(every) // self.of
        labelled = every[(self.number - 1) * count : self.number * count]
        found = self._of_the_run() if self.of == 1 else None
        if found is None:
            folder = RunFolder(storage.join(self.out, "models", f"part{self.number}of{self.of}"))
            config = changed(config, {"stage1.labelled_batch": min(count, config.stage1.labelled_batch)})
            on = watched(f"{count} labels: step", config.stage1.steps, progress, warn)
            side_run(config, folder.out, self.examined.split_of(labelled), local, on)
            found = folder.result("stage1")
        return Measured(labels=count, mean_iou=found["mean_iou"], hours=found["seconds"] / 3600)

    def _of_the_run(self) -> StageResult | None:
        """What stage 1 of the run came to, where it is such a model."""
        folder = RunFolder.at(self.examined.run)
        if not folder.is_done("stage1"):
            return None
        inputs = storage.read_json(storage.join(folder.part("stage1"), "inputs.json"), StageInputs)
        same = inputs["keys"] == stage_keys(self.examined.config, "stage1")
        return folder.result("stage1") if same else None


def _hours_of(run: str) -> float:
    folder = RunFolder.at(run)
    return sum(folder.result(stage)["seconds"] for stage in STAGES if folder.is_done(stage)) / 3600
