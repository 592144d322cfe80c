"""Why: an estimate without labels is only as good as what was measured with labels when the stage ended."""

from pathlib import Path

import numpy as np
import pytest

from threestage.calibration import REFERENCE_IMAGES, TEMPERATURES, fitted_temperature, training_sample
from threestage.data import storage
from threestage.data.batches import SampleSet
from threestage.data.datasets import validation_set
from threestage.data.pool import load_pool
from threestage.data.records import load_manifest
from threestage.data.samples import Decoding
from threestage.data.split import saved_split
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.estimates import CALIBRATION, Calibration
from threestage.prediction.image_model import Model
from threestage.prediction.predict import read_model


def test_the_temperature_is_that_of_the_measured_mean_iou() -> None:
    expected = np.linspace(0.9, 0.3, len(TEMPERATURES))
    assert fitted_temperature(expected, float(expected[4])) == pytest.approx(TEMPERATURES[4])
    assert TEMPERATURES[4] < fitted_temperature(expected, float(expected[4] + expected[5]) / 2) < TEMPERATURES[5]
    assert fitted_temperature(expected, 0.95) == TEMPERATURES[0]
    assert fitted_temperature(expected, 0.1) == TEMPERATURES[-1]


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_a_stage_leaves_its_calibration(finished_run: Path, scenes: Path, stage: str) -> None:
    """The estimate of its validation images is their mean IoU, and they hardly drift."""
    folder = finished_run / stage
    model = Model.of(read_model(str(folder), RegistrySettings()), stage)
    stored = Calibration.model_validate_json((folder / "model" / CALIBRATION).read_bytes())
    result = storage.read_json(str(folder / "result.json"))
    assert stored.mean_iou == pytest.approx(result["mean_iou"]) and stored.images == 6
    split = saved_split(str(finished_run / "split.json"))[0]
    images = validation_set(str(scenes), load_manifest(str(scenes)), split, 1)
    found = [model.predict(images.decoded(index).image).estimate for index in range(len(images))]
    assert all(one is not None for one in found)
    drift = np.median([one.drift for one in found if one is not None])
    assert abs(drift) < 0.05, "0 is the median of the validation images"
    assert model.estimator is not None
    shares = [share for share, iou in zip(stored.shares, result["per_class_iou"].values(), strict=True) if iou is None]
    assert not any(shares), "a class that no validation image shows does not count"


def test_training_images_are_taken_from_all_over_the_pool(finished_run: Path, scenes: Path) -> None:
    pool, split = load_pool(str(finished_run / "pool.parquet")), saved_split(str(finished_run / "split.json"))[0]
    labelled = SampleSet([], 1)
    found = training_sample(labelled, pool, Decoding(), frozenset(split.validation))
    assert len(found) == min(REFERENCE_IMAGES, sum(file.rows for file in pool)) and len(set(found.ids)) == len(found)
    assert not set(found.ids) & set(split.validation)
    small = Decoding(max_pixels=64 * 63)
    assert len(training_sample(labelled, pool, small, frozenset())) == 0
