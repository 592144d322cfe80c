"""A tiny model behind a web application."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.prediction.test_estimates import calibration
from tests.unit.prediction.test_predict import make_model
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.estimates import CALIBRATION
from threestage.serving.image_answers import ImageAnswers
from threestage.serving.service import ImageService
from threestage.serving.settings import ServeSettings
from threestage.serving.web_app import web_app

TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="package")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    make_model(folder)
    (folder / CALIBRATION).write_text(calibration().model_dump_json())
    return folder


@pytest.fixture(scope="package")
def answers(model_folder: Path) -> Iterator[ImageAnswers]:
    model = str(model_folder)
    yield ImageAnswers(model, RegistrySettings(), model, ServeSettings(), pytest.fail)


@pytest.fixture
def app(answers: ImageAnswers) -> Any:
    """With a token, and bodies of 20,000 bytes at most."""
    service = ImageService(answers.answer, ServeSettings(most_bytes=20_000), TOKEN, pytest.fail)
    return web_app(service, lambda: answers.followed.version)
