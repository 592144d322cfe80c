"""A model in several processes of a cluster, as a deployment of Ray Serve, behind one server that sends them images.

Ray Serve restarts a replica that dies. Its own HTTP proxy is not started: the server is the process of the command.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import ReplicaUnavailableError

from threestage.allocator import disable_malloc_trim
from threestage.data import storage
from threestage.errors import StageFailure, Warn
from threestage.mlflow_sync.connection import resolve_uri
from threestage.mlflow_sync.records import RegistrySettings
from threestage.ray_backend.capacity import warn_of_folders
from threestage.ray_backend.connect import connected, gpus_taken
from threestage.ray_backend.stall_monitor import await_resources
from threestage.ray_settings import ClusterSettings
from threestage.serving.answer import Answer, Form
from threestage.serving.followed_model import current_version
from threestage.serving.image_answers import ImageAnswers
from threestage.serving.settings import ServeSettings
from threestage.serving.web_server import Started, listening, run_server

LOST = (RayActorError, ObjectLostError, ReplicaUnavailableError)
"""The replica died, or what it sent: a prediction can be made again."""
CHECK_S = 2.0
QUIET = {"log_level": "WARNING", "enable_access_log": False}


class _Replica:
    """`version`: what to begin with, where the newest fails."""

    def __init__(
        self, model: str, registry: RegistrySettings, version: str, settings: ServeSettings, cpus: float
    ) -> None:
        disable_malloc_trim()
        torch.set_num_threads(max(1, int(cpus)))
        self._answers = ImageAnswers(model, registry, version, settings, logging.getLogger("ray.serve").warning)
        self._answers.followed.check()

    async def answer(self, data: bytes, form: Form) -> Answer:
        return await self._answers.answer(data, form)


class RetryingHandle:
    """Sends images to the replicas; once more where the replica died meanwhile. `version`: of the last answer."""

    def __init__(self, handle: Any, version: str) -> None:
        self._handle = handle
        self.version = version

    async def answer(self, data: bytes, form: Form) -> Answer:
        try:
            found = await self._handle.answer.remote(data, form)
        except LOST:
            found = await self._handle.answer.remote(data, form)
        answer = Answer(*found)
        self.version = answer.version or self.version
        return answer


def serve_on_ray(
    model: str,
    registry: RegistrySettings,
    settings: ServeSettings,
    token: str | None,
    cluster: ClusterSettings,
    started: Started,
    warn: Warn,
) -> None:
    """As `serve_here`, with `cluster.workers` replicas. Raises StageFailure where the cluster has no room, or none starts."""
    version = current_version(model, registry)
    model, version = (name if name.startswith("models:/") else storage.absolute(name) for name in (model, version))
    registry, cluster = RegistrySettings(tracking_uri=resolve_uri(registry.tracking_uri)), gpus_taken(cluster)
    with listening(settings) as listener, connected(cluster):
        warn_of_folders([] if model.startswith("models:/") else [model], warn)
        await_resources("serve", cluster, warn)
        with _deployed(model, registry, version, settings, cluster) as handle:
            retrying = RetryingHandle(handle, version)
            run_server(listener, retrying.answer, lambda: retrying.version, settings, token, started, warn)


@contextmanager
def _deployed(
    model: str, registry: RegistrySettings, version: str, settings: ServeSettings, cluster: ClusterSettings
) -> Iterator[Any]:
    """A handle of the replicas. Those of an earlier server of the same model, which did not end by itself, are replaced."""
    name = "threestage-" + re.sub(r"[^\w.-]+", "-", model).strip("-")
    deployment = serve.deployment(
        _Replica,
        name="replica",
        num_replicas=cluster.most_workers,
        max_ongoing_requests=settings.most_requests,
        health_check_period_s=CHECK_S,
        graceful_shutdown_timeout_s=settings.drain_s,
        ray_actor_options={key: value for key, value in cluster.task_options.items() if value},
        logging_config=QUIET,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=QUIET)
    application = deployment.bind(model, registry, version, settings, cluster.cpus_per_worker)
    try:
        handle = serve.run(application, name=name, route_prefix=None, logging_config=QUIET)
    except RuntimeError as error:
        with suppress(RuntimeError):
            serve.delete(name)
        reason = " ".join(str(error).split())[-300:]
        raise StageFailure(
            f"{model}: no replica started ({reason}); see Ray's logs of its replicas", "serve/no-replica"
        ) from None
    try:
        yield handle
    finally:
        serve.delete(name)
        if not serve.status().applications:
            serve.shutdown()
