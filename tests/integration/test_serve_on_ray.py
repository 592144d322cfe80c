"""`threestage serve` with replicas: a request whose replica is killed is answered by another."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.images import encoded
from tests.unit.prediction.test_predict import make_model
from threestage.mlflow_sync.records import RegistrySettings
from threestage.ray_settings import ClusterSettings
from threestage.serving.settings import ServeSettings

pytest.importorskip("grpc_reflection", reason="the extra serve is not installed")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # Ray's own
]
PNG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)))


def test_a_killed_replica_costs_no_request(ray_cluster: None, tmp_path: Path) -> None:
    from threestage.ray_backend import replicas
    from threestage.serving.service import AnswerImage

    make_model(tmp_path / "model")
    statuses: list[int] = []

    def listen(listener: object, answer: AnswerImage, version: object, *others: object) -> None:
        async def load() -> None:
            async def client() -> None:
                for _ in range(30):
                    found = await answer(PNG, "json")
                    statuses.append(found.status)

            clients = [asyncio.create_task(client()) for _ in range(4)]
            await asyncio.sleep(0.3)
            os.kill(replica_processes()[0], signal.SIGKILL)
            await asyncio.gather(*clients)

        asyncio.run(load())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas, "run_server", listen)
        settings, cluster = ServeSettings(port=0), ClusterSettings(workers=2)
        replicas.serve_on_ray(
            str(tmp_path / "model"), RegistrySettings(), settings, None, cluster, lambda url: None, lambda text: None
        )
    assert statuses == [200] * 120
    assert replica_processes() == [], "the server has taken its replicas down"


def replica_processes() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return sorted(found)
