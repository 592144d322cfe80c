"""What a run asks of a Ray cluster. Imports no Ray, so that a configuration can be read without it."""

from pydantic import Field

from threestage.settings import Settings


class ClusterSettings(Settings):
    address: str | None = Field(None, description="of a running cluster; none starts one on this machine")
    workers: int = Field(1, ge=1, description="training processes; every one takes the batch of the stage")
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    predictors: int = Field(1, ge=1, description="processes that predict pseudo-masks")
    max_failures: int = Field(3, ge=-1, description="times a stage is restarted from its last checkpoint")
    start_timeout_s: int = Field(300, ge=1, description="how long to wait for the workers to come up")
