"""`threestage predict` as a Ray Data job, from one S3 prefix to another: the masks of this process, each image once."""

import io
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refused
from tests.unit.prediction.test_predict import make_model
from threestage.data import storage
from threestage.data.pool import data_set_files
from threestage.data.records import load_manifest
from threestage.data.rejects import read_rejects
from threestage.errors import StageFailure
from threestage.prediction.pool_prediction import predict_pool_here
from threestage.prediction.predict import PredictReport, PredictSettings, predict_input
from threestage.prediction.pseudo_masks import PoolTask
from threestage.prediction.tta import TTASettings
from threestage.ray_backend.predict import predict_on_ray, predict_pool_connected
from threestage.ray_settings import ClusterSettings

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("default"),  # Ray's own
]
IMAGES, ROWS_PER_PART = 20, 12


def upload(folder: str) -> None:
    """20 images, the last of which is broken."""
    for i in range(IMAGES):
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)).save(stream, "JPEG")
        data = stream.getvalue()
        storage.write_bytes(f"{folder}/{i % 3}/{i:02d}.jpg", data[:-300] if i == IMAGES - 1 else data)


def versions(folder: str) -> dict[str, tuple[int, int]]:
    """Size and time of writing of every object below a folder."""
    found = {}
    for uri in storage.list_files(folder):
        files, path = storage.filesystem(uri)
        info = files.get_file_info(path)
        found[uri] = (info.size, info.mtime_ns)
    return found


def test_two_parts_with_a_broken_image_and_again(s3_root: str, ray_cluster: None, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    source, out = f"{s3_root}/photos", f"{s3_root}/predicted"
    upload(source)
    settings = PredictSettings(protocol=TTASettings(flip=True), rows_per_part=ROWS_PER_PART, max_bad_fraction=0.05)
    cluster = ClusterSettings(workers=2)
    seen: list[tuple[int, int]] = []

    def predict(chosen: PredictSettings) -> PredictReport:
        return predict_on_ray(model, source, out, chosen, cluster, lambda *done: seen.append(done))

    with refused("data/bad-images", "1 of 20 images", "--max-bad-fraction", error=StageFailure):
        predict(settings.model_copy(update={"max_bad_fraction": 0.04}))
    assert seen[-1] == (20, 20) and len(storage.list_files(f"{out}/parts")) == 2
    made = versions(f"{out}/masks") | versions(f"{out}/overlays") | versions(f"{out}/parts")
    assert len(made) == 19 + 19 + 2

    report = predict(settings)
    assert (report.images, report.kept, report.bad) == (19, 19, 1), "nothing is predicted twice"
    assert [reject.image_id for reject in read_rejects(report.rejects_uri)] == ["1/19"]
    assert versions(f"{out}/masks") | versions(f"{out}/overlays") | versions(f"{out}/parts") == made

    lost = storage.list_files(f"{out}/parts")[0]  # as if the job had been killed before it was written
    rows = storage.read_table(lost).num_rows
    storage.delete(lost, out)
    report = predict(settings)
    rejected = rows - (19 - report.kept)
    assert report.images == 19 and rejected in (0, 1), "only the lost part is predicted again"
    still = {uri for uri, version in made.items() if versions(out)[uri] == version}
    assert len(still & set(storage.list_files(f"{out}/masks"))) == report.kept

    here = predict_input(model, source, f"{s3_root}/here", settings)
    assert here.images == 19
    for uri in storage.list_files(f"{out}/masks"):
        assert storage.read_bytes(uri) == storage.read_bytes(uri.replace("/predicted/", "/here/"))
    with refused("predict/other-settings", "model="):
        predict_on_ray(make_model(tmp_path / "other", seed=1), source, out, settings, cluster)


@pytest.mark.parametrize("features", [False, True])
def test_a_pool_that_a_command_predicts_is_that_of_this_process(
    features: bool, ray_cluster: None, scenes: Path, tmp_path: Path
) -> None:
    """What `next` does, and `labels export` where the run has not stored its champion's predictions."""
    make_model(tmp_path / "model")
    found = []
    on_ray = partial(predict_pool_connected, cluster=ClusterSettings(workers=2))
    for name, predict in (("here", predict_pool_here), ("ray", on_ray)):
        task = PoolTask(
            destination=f"{tmp_path}/{name}", model_digest="m", num_classes=3, downscale=1, batch_size=3,
            max_image_pixels=10_000, used_ids=frozenset(), excluded_ids=frozenset(),
            features=features,
        )  # fmt: skip
        files = [
            file.model_copy(update={"replaced": (0, 3)})
            for file in data_set_files(str(scenes), load_manifest(str(scenes)))
        ]
        reports = {report.file: report for report in predict(str(tmp_path / "model"), task, files)}
        found.append((reports, [storage.read_table(f"{tmp_path}/{name}/{file.name}").to_pylist() for file in files]))
    assert found[0] == found[1]
