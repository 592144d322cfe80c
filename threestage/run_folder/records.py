"""What the JSON files of a run must hold to be read. They have other keys beside, which are kept."""

from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict

from threestage.run_folder.lineage import DataSet

OTHERS_TOO = ConfigDict(extra="allow")


def _has_step(row: dict[str, Any]) -> dict[str, Any]:
    if row.get("step") is None:
        raise ValueError("a row without a step")
    return row


HistoryRow = Annotated[dict[str, int | float | None], AfterValidator(_has_step)]


@with_config(OTHERS_TOO)
class Evaluated(TypedDict):
    """One evaluation."""

    mean_iou: float


@with_config(OTHERS_TOO)
class EvaluatedAt(Evaluated):
    step: int


@with_config(OTHERS_TOO)
class StageResult(TypedDict):
    """result.json of a stage."""

    mean_iou: float
    pixel_accuracy: float
    per_class_iou: Annotated[dict[str, float | None], Field(min_length=1)]
    steps: int
    seconds: float
    model_digest: str
    history: list[HistoryRow]
    last: NotRequired[EvaluatedAt]
    best: NotRequired[EvaluatedAt]
    student: NotRequired[Evaluated]


@with_config(OTHERS_TOO)
class StageInputs(TypedDict):
    """inputs.json of a stage: what it was begun with."""

    code_version: str
    pseudo_masks: str | None
    labelled: str
    validation: str
    keys: dict[str, Any]


@with_config(OTHERS_TOO)
class StageMarker(TypedDict):
    """done.json of a stage."""

    code_version: str
    keys: dict[str, Any]
    finished: float
    model_digest: str
    validation: NotRequired[str | None]
    data: NotRequired[DataSet]


@with_config(OTHERS_TOO)
class StageFigures(TypedDict):
    """A stage in results.json."""

    mean_iou: float
    best_mean_iou: NotRequired[float]
    student_mean_iou: NotRequired[float]


@with_config(OTHERS_TOO)
class DataUsed(TypedDict):
    root: NotRequired[str]
    pool: NotRequired[int]


@with_config(OTHERS_TOO)
class Results(TypedDict):
    """results.json of a run."""

    name: NotRequired[str]
    seed: int
    stages: dict[str, StageFigures]
    data: NotRequired[DataUsed]
    no_verdict: NotRequired[str | None]


@with_config(OTHERS_TOO)
class RunSettings(TypedDict):
    """config.json of a run, of this version or another."""

    name: NotRequired[str]
    seed: NotRequired[int]
    stages: NotRequired[int]
    data: NotRequired[DataUsed]
    registry: NotRequired[dict[str, Any] | None]


@with_config(OTHERS_TOO)
class SavedScores(TypedDict):
    """metrics.json of an evaluation."""

    stage: str
    model: str
    split: str
    protocol: str
    mean_iou: float | None
