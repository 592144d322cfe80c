"""What is sent to MLflow as plain values, and the settings of the place (`registry`). Imports no MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from threestage.settings import Settings

Status = Literal["FINISHED", "FAILED", "KILLED"]
TrialStatus = Status | Literal["SCHEDULED", "RUNNING"]
Row = Mapping[str, float]


class RegistrySettings(Settings):
    """MLflow, which records runs and models."""

    tracking_uri: str | None = None
    """Address of MLflow; null: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder (`mlflow ui` shows it)."""
    experiment: str = Field("threestage", description="name of the MLflow experiment")
    model_name: str | None = Field(default=None, pattern=r"^[^/:@]+$")
    """Name of the registered model, one per project; null: the run's name."""
    approve_champion: bool = Field(
        False, description="a new best version waits as candidate until `threestage models promote --approve`"
    )
    max_drift: float | None = Field(
        default=None,
        description="drift of the validation images from the training images above which a version does not become the champion "
        "by itself; null: any",
    )


@dataclass(frozen=True)
class StageRows:
    """How far a stage is. The same `attempt` is the same training, in a new process too."""

    run_name: str
    run_key: str  # names the run's folder for ever: the same key is the same run
    stage: str  # stage1 | stage2 | stage3
    attempt: str  # a stage that is trained anew, from its first step, has another
    config: Mapping[str, Any]
    rows: Sequence[Row]  # "step" and values, in order
    steps_before: int = field(default=0, kw_only=True)  # of the run's earlier stages


@dataclass(frozen=True)
class StageRecord(StageRows):
    """All that is recorded of one finished stage."""

    model_dir: str  # URI of a folder with model.safetensors and model.json
    summary: Mapping[str, float]
    tags: Mapping[str, str]
    lineage: Mapping[str, Any]  # see threestage.run_folder.lineage


@dataclass(frozen=True)
class TrialRecord:
    """All that is recorded of one trial of a sweep."""

    sweep_key: str  # names the sweep's folder for ever
    sweep_name: str
    number: int
    params: Mapping[str, Any]  # dotted keys
    curve: Sequence[tuple[int, float]]  # (step, mean IoU in [0,1]), rising steps
    tags: Mapping[str, str]
    status: TrialStatus


@dataclass(frozen=True)
class RegisteredVersion:
    """`champion`: in words, whether this version took the alias, and why; `no_program`: why it has no exported program."""

    name: str
    version: int
    run_id: str
    alias: str
    champion: str
    no_program: str | None = None
