"""A server as its user starts it: swaps, drains and shows its page; and MLflow's own server of the same model."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser import browser, found_browser
from tests.images import encoded
from tests.s3 import free_port
from tests.servers.test_registry_mlflow import digest_of, lineage_of, settings_of
from tests.unit.prediction.test_predict import make_model
from threestage.mlflow_sync import packing
from threestage.mlflow_sync.client import Registry, open_registry
from threestage.mlflow_sync.records import RegistrySettings, StageRecord
from threestage.models.program import write_program
from threestage.prediction.image_model import Model
from threestage.prediction.predict import network_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PHOTO = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
PNG = encoded(Image.fromarray(PHOTO))
TOKEN = "of-the-test"


@pytest.fixture
def store(tmp_path: Path, empty_store: Path) -> str:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def register(registry: Registry, folder: Path, seed: int, stage: str) -> None:
    """A version of the model "shapes", which becomes its champion where its mean IoU, `seed` tenths, is the highest."""
    make_model(folder, seed)
    digest = digest_of(str(folder))
    record = StageRecord(
        run_name="shapes", run_key=f"/runs/{seed}", stage=stage, attempt=str(seed), config=settings_of("/shapes"), rows=[],
        model_dir=str(folder), summary={"mean_iou": seed / 10}, tags={}, lineage=lineage_of(stage, digest),
    )  # fmt: skip
    registry.record_stage(replace(record, summary={"mean_iou": seed / 10}))


@contextlib.contextmanager
def server(
    command: list[str], log: Path, address: str | None = None, **variables: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Its URL, and its process in a group of its own."""
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **variables}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        until(lambda: (address or "http://" in log.read_text()) and process.poll() is None, log)
        found = address or re.search(r"http://[\d.]+:\d+", log.read_text())[0]  # type: ignore[index]
        yield found, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(true: Callable[[], Any], log: Path, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def post(url: str, body: bytes, **headers: str) -> tuple[bytes, str]:
    """The answer, and which version gave it."""
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as reply:
        return reply.read(), reply.headers.get("X-Threestage-Model", "")


def expected(folder: Path) -> np.ndarray:
    return Model(*network_of(make_model(folder, int(folder.name)))).predict(PHOTO).class_ids


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


SERVE = [sys.executable, "-m", "threestage", "serve", "shapes@champion", "--local", "--port", "0"]


def test_it_follows_the_champion_and_answers_open_requests_before_it_ends(store: str, tmp_path: Path) -> None:
    registry, log = open_registry(RegistrySettings(tracking_uri=store)), tmp_path / "log"
    register(registry, tmp_path / "1", 1, "stage2")
    head = {"Authorization": f"Bearer {TOKEN}"}
    with server([*SERVE, "--tracking-uri", store], log, THREESTAGE_SERVE_TOKEN=TOKEN) as (url, process):
        mask, version = post(f"{url}/predict?as=mask", PNG, **head)
        (tmp_path / "mask.png").write_bytes(mask)
        with Image.open(tmp_path / "mask.png") as found:
            assert np.array_equal(np.asarray(found), expected(tmp_path / "1")) and version == "models:/shapes/1"
        register(registry, tmp_path / "2", 2, "stage3")
        until(lambda: post(f"{url}/predict", PNG, **head)[1] == "models:/shapes/2", log, 60)
        with ThreadPoolExecutor(8) as threads:
            large = encoded(Image.fromarray(np.tile(PHOTO, (3, 3, 1))))
            open_requests = [threads.submit(post, f"{url}/predict", large, **head) for _ in range(8)]
            until(lambda: b"threestage_open_requests 8.0" in metrics(url), log, 30)
            process.send_signal(signal.SIGTERM)
            for request in open_requests:
                assert json.loads(request.result()[0])["width"] == 384
        assert process.wait(60) == 0 and not answers(f"{url}/health")
    assert TOKEN not in log.read_text()


def metrics(url: str) -> bytes:
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return bytes(reply.read())


def test_an_image_dropped_on_the_page_in_a_browser(tmp_path: Path) -> None:
    path = found_browser()
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    make_model(tmp_path / "1", 1)
    (tmp_path / "profile").mkdir()
    (tmp_path / "photo.png").write_bytes(PNG)
    command = [*SERVE[:4], str(tmp_path / "1"), "--local", "--port", "0"]
    with server(command, tmp_path / "log") as (url, _), browser(path, tmp_path / "profile") as page:
        token = re.search(r"#token=(\S+)", (tmp_path / "log").read_text())
        assert token is not None
        page.open(f"{url}/#token={token[1]}")
        assert page.value("location.href") == f"{url}/", "the token is taken from the address"
        document = page.call("DOM.getDocument")["root"]["nodeId"]
        field = page.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "photo.png")])
        shown = "document.getElementById('status').textContent"
        until(lambda: "128×96" in page.value(shown), tmp_path / "log", 60)
        until(lambda: page.value("document.getElementById('overlay').naturalWidth") == 128, tmp_path / "log", 10)
        rows = page.value("[...document.querySelectorAll('tr')].map(row => row.textContent)")
        assert rows and all(re.fullmatch(r"[abc][\d.]+ %", row) for row in rows)
        page.value(
            "(() => { const data = new DataTransfer(); data.items.add(new File(['no image'], 'x.png'));"
            "document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: data})) })()"
        )
        until(lambda: "cannot be decoded" in page.value(shown), tmp_path / "log", 20)
        assert all(request.startswith((url, "blob:")) for request in page.requests())


def test_mlflows_server_answers_base64_with_the_same_classes(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What people try first."""
    monkeypatch.setattr(packing, "write_program", write_program)  # with its own weights, see conftest.py
    register(open_registry(RegistrySettings(tracking_uri=store)), tmp_path / "1", 1, "stage3")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/shapes@champion", "--env-manager", "local",
        "--port", str(port),
    ]  # fmt: skip
    text = base64.b64encode(PNG).decode()
    with server(command, tmp_path / "log", url, MLFLOW_TRACKING_URI=store):
        until(lambda: answers(f"{url}/ping"), tmp_path / "log", 240)
        for body in (
            {"inputs": [text]}, {"instances": [{"b64": text}]}, {"dataframe_split": {"columns": ["image"], "data": [[text]]}},
        ):  # fmt: skip
            answer = post(f"{url}/invocations", json.dumps(body).encode(), **{"Content-Type": "application/json"})[0]
            found = np.array(json.loads(answer)["predictions"])
            assert np.array_equal(found, expected(tmp_path / "1")[None])
