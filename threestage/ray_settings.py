"""What a run asks of a Ray cluster. Imports no Ray, so that a configuration can be read without it."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, model_validator

from threestage.errors import InputError
from threestage.settings import Settings


class ClusterSettings(Settings):
    address: str | None = Field(None, description="address of a running cluster; null starts one on this machine")
    workers: int | tuple[int, int] = Field(
        1, description="training processes; [least, most]: continues with fewer when nodes are lost, and adds new ones"
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of a training worker, and of a predictor")
    gpus_per_worker: Literal["auto"] | NonNegativeFloat = Field(
        "auto",
        description="GPUs of a training worker, and of a predictor; 0 trains on the CPU; auto: 1 if Ray is started on this "
        "machine and it has one for each, else 0",
    )
    resources_per_worker: dict[str, float] = Field(
        {}, description="other resources of a worker, in Ray's names: memory …"
    )
    accelerator: str | None = Field(None, description="type of the GPUs in Ray's names, e.g. H100 or A10G")
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="few nodes (PACK) or many (SPREAD); STRICT: one node, or one per worker"
    )
    backend: Literal["auto", "nccl", "gloo"] = Field(
        "auto", description="communication library; auto: nccl on GPUs, gloo on CPUs"
    )
    sync_batch_norm: bool | None = Field(
        None, description="batch norm over the images of all workers; null: on GPUs, if some batch norm is live"
    )
    predictors: int | None = Field(
        None, ge=1, description="processes that predict pseudo-masks; null: as many as workers"
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="maximum restarts of a stage from its last checkpoint, and of files whose process was lost; -1: no limit",
    )
    start_timeout_s: int = Field(
        300,
        ge=1,
        description="seconds without room for the workers and without a new node after which the run fails",
    )
    report_after_s: int = Field(30, ge=1, description="seconds between reports of missing resources")
    collective_timeout_s: int = Field(600, ge=1, description="seconds that workers wait for an unreachable one")
    hang_after_s: int = Field(300, ge=1, description="seconds without a step after which every worker logs its stack")
    resize_after_s: float = Field(
        600,
        ge=0,
        description="seconds between additions of new nodes to an elastic group, which then restarts from its last checkpoint",
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

    @property
    def gpus(self) -> float:
        """GPUs of a worker; 0 while they are `auto`, in place of which `ray_backend.connect.with_gpus` puts a number."""
        return 0.0 if self.gpus_per_worker == "auto" else self.gpus_per_worker

    def synchronises(self, live: bool) -> bool:
        """Whether batch norm is over the images of all workers, where a network has a `live` one."""
        return live and (self.gpus > 0 if self.sync_batch_norm is None else self.sync_batch_norm)

    @property
    def devices(self) -> float:
        """The most GPUs that a run has, or workers where those have none."""
        return self.most_workers * (self.gpus or 1)

    @property
    def worker_resources(self) -> dict[str, float]:
        """What one worker takes, in Ray's names."""
        gpus = {"GPU": self.gpus} if self.gpus else {}
        return {"CPU": self.cpus_per_worker, **gpus, **self.resources_per_worker}

    @property
    def task_options(self) -> dict[str, Any]:
        """What one worker takes, as options of a task or an actor, of which Ray wants memory apart from the others."""
        others = dict(self.resources_per_worker)
        return {
            "num_cpus": self.cpus_per_worker,
            "num_gpus": self.gpus,
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
        if self.sync_batch_norm and not self.gpus:
            raise InputError(
                "sync_batch_norm=true: needs GPUs, torch has none for CPUs; set gpus_per_worker, or sync_batch_norm=null",
                "config/conflict",
            )
        if self.backend == "nccl" and not self.gpus:
            raise InputError("backend=nccl: needs GPUs; set gpus_per_worker, or backend=gloo", "config/conflict")
        if self.accelerator is not None and not self.gpus:
            raise InputError(
                f"accelerator={self.accelerator}: needs GPUs; set gpus_per_worker, or accelerator=null",
                "config/conflict",
            )
        if not {"CPU", "GPU"}.isdisjoint(self.resources_per_worker):
            raise InputError(
                "resources_per_worker: give CPU and GPU as cpus_per_worker and gpus_per_worker", "config/conflict"
            )
        return self
