"""What a run asks of a Ray cluster. Imports no Ray, so that a configuration can be read without it."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from threestage.errors import InputError
from threestage.settings import Settings


class ClusterSettings(Settings):
    address: str | None = Field(None, description="of a running cluster; none starts one on this machine")
    workers: int | tuple[int, int] = Field(
        1, description="training processes; [least, most]: goes on with fewer when nodes are lost, takes new ones in"
    )
    cpus_per_worker: float = Field(1, gt=0, description="of a training worker, and of a predictor")
    gpus_per_worker: float = Field(0, ge=0, description="the same; 0 trains on the CPU")
    resources_per_worker: dict[str, float] = Field({}, description="what else a worker takes, in Ray's names: memory …")
    accelerator: str | None = Field(None, description="type of the GPUs in Ray's names, e.g. H100 or A10G")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="workers on few nodes or on many; STRICT: on one, or each on its own"
    )
    backend: Literal["auto", "nccl", "gloo"] = Field("auto", description="auto: nccl on GPUs, gloo on CPUs")
    sync_batch_norm: bool | None = Field(
        None, description="batch norm over the images of all workers; null: on GPUs, where some is live"
    )
    predictors: int | None = Field(
        None, ge=1, description="processes that predict pseudo-masks; null: as many as workers"
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="times a stage is restarted from its last checkpoint, or files are begun again whose process was lost; "
        "-1: always",
    )
    start_timeout_s: int = Field(
        300,
        ge=1,
        description="how long a run waits without room for its workers, and without a new node, before it fails",
    )
    report_after_s: int = Field(
        30, ge=1, description="when missing resources are reported, and again each time it has passed"
    )
    collective_timeout_s: int = Field(600, ge=1, description="how long workers wait for one that is cut off")
    hang_after_s: int = Field(300, ge=1, description="without a step, every worker writes its stack to its log")
    resize_after_s: float = Field(
        600,
        ge=0,
        description="how often an elastic group takes new nodes in; it then starts again from its last checkpoint",
    )

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def number_of_predictors(self) -> int:
        return self.predictors or self.most_workers

    def synchronises(self, live: bool) -> bool:
        """Whether batch norm is over the images of all workers, where a network has a `live` one."""
        return live and (self.gpus_per_worker > 0 if self.sync_batch_norm is None else self.sync_batch_norm)

    @property
    def devices(self) -> float:
        """The most GPUs that a run has, or workers where those have none."""
        return self.most_workers * (self.gpus_per_worker or 1)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What one worker takes, in Ray's names."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus, **self.resources_per_worker}

    @property
    def task_options(self) -> dict[str, Any]:
        """What one worker takes, as options of a task or an actor, of which Ray wants memory apart from the others."""
        others = dict(self.resources_per_worker)
        return {
            "num_cpus": self.cpus_per_worker,
            "num_gpus": self.gpus_per_worker,
            "memory": others.pop("memory", None),
            "resources": others,
            "accelerator_type": self.accelerator,
        }

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not 1 <= self.least_workers <= self.most_workers:
            raise InputError(
                f"workers={self.workers}: at least 1, or [least, most] with least ≤ most", "config/invalid-value"
            )
        if self.sync_batch_norm and not self.gpus_per_worker:
            raise InputError(
                "sync_batch_norm=true: needs GPUs, torch has none for CPUs; set gpus_per_worker, or sync_batch_norm=null",
                "config/conflict",
            )
        if self.backend == "nccl" and not self.gpus_per_worker:
            raise InputError("backend=nccl: needs GPUs; set gpus_per_worker, or backend=gloo", "config/conflict")
        if self.accelerator is not None and not self.gpus_per_worker:
            raise InputError(
                f"accelerator={self.accelerator}: needs GPUs; set gpus_per_worker, or accelerator=null",
                "config/conflict",
            )
        if not {"CPU", "GPU"}.isdisjoint(self.resources_per_worker):
            raise InputError(
                "resources_per_worker: give CPU and GPU as cpus_per_worker and gpus_per_worker", "config/conflict"
            )
        return self
