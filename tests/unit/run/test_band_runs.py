"""Why: images of other bands than RGB pass through every part of a run; one that forgets them trains on something else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.bad_inputs.models import packed_model
from tests.conftest import local_config
from tests.images import encoded, tiff
from tests.refusals import refused
from tests.runs import run_local
from threestage.config import stage_keys
from threestage.data.bands import Bands, Levels
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.records import load_manifest, pool_files
from threestage.data.samples import Decoding
from threestage.evaluation import evaluate_model
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import load_card, load_model
from threestage.prediction.image_model import Model
from threestage.prediction.predict import PredictSettings, predict_input, read_model
from threestage.ray_backend.pool_reader import FilePart, FileReader
from threestage.report.data_set_preview import write_preview
from threestage.serving.answer import answer_image

SIDE, IMAGES = 32, 18
CLASS_MAP = (
    "ignore: []\nclasses:\n- {name: dry, ids: [0], colour: [0, 0, 0]}\n- {name: wet, ids: [1], colour: [0, 0, 255]}\n"
)

Encode = Callable[[np.ndarray], bytes]
KINDS: dict[str, tuple[int, str, Encode]] = {
    "8-bit grey": (1, ".png", lambda image: encoded(Image.fromarray((255 * image[..., 3]).astype(np.uint8)))),
    "16-bit grey": (1, ".png", lambda image: encoded(Image.fromarray((2000 + 9000 * image[..., 3]).astype(np.uint16)))),
    "4 bands": (4, ".png", lambda image: encoded(Image.fromarray((255 * image).astype(np.uint8)))),
    "4 bands of floats": (4, ".tif", lambda image: tiff((5 * image - 1).astype(np.float32), 1)),
}


def write_set(folder: Path, kind: str, **options: Any) -> str:
    """A data set whose classes differ in the last band alone; red, green and blue are noise."""
    bands, suffix, encode = KINDS[kind]
    if suffix == ".tif":
        pytest.importorskip("imagecodecs")
        pytest.importorskip("tifffile")
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for number in range(IMAGES):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        top, left = random.integers(0, SIDE // 2, 2)
        mask[top : top + SIDE // 2, left : left + SIDE // 2] = 1
        image = random.uniform(0.2, 0.8, (SIDE, SIDE, 4))
        image[..., 3] = 0.3 + 0.4 * mask + random.uniform(-0.1, 0.1, mask.shape)
        (folder / f"images/{number}{suffix}").write_bytes(encode(image))
        Image.fromarray(mask).save(folder / f"masks/{number}.png")
    (folder / "classes.yaml").write_text(CLASS_MAP)
    places = {"masks": str(folder / "masks"), "class_map": str(folder / "classes.yaml")}
    settings = IngestSettings(format="folders", bands=bands, **places, **options)
    report = ingest(str(folder / "images"), str(folder / "data"), settings)
    assert (report.added_images, report.bad) == (IMAGES, 0)
    return str(folder / "data")


@pytest.fixture(scope="module")
def four_bands(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_set(tmp_path_factory.mktemp("four"), "4 bands", rows_per_file=8)


def train(root: str, out: Path, **changes: Any) -> float:
    """The mean IoU of the last stage. (Of one band even these convolutions of 4 channels run with the channels last, which they
    cannot on torch's CPU.)"""
    steps = {f"stage{number}__steps": 2 for number in (1, 2, 3)}
    config = local_config(Path(root), **{**steps, "training__channels_last": False, **changes})
    run_local(config, out)
    result = json.loads((out / f"stage{config.stages}" / "result.json").read_text())
    return float(result["mean_iou"])


@pytest.mark.parametrize(
    "kind",
    [
        "16-bit grey",
        "4 bands of floats",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("8-bit grey", "4 bands")),
    ],
)
def test_any_bands_train_reload_and_predict_files_as_their_pixels(kind: str, tmp_path: Path) -> None:
    root = write_set(tmp_path, kind)
    train(root, tmp_path / "run", stages=1, network__encoder="test_resnet")  # see `train`
    model = tmp_path / "run/stage1/model"
    network, card = load_model(str(model))
    bands = load_manifest(root).bands
    assert bands is not None and card.bands == bands and bands.count == KINDS[kind][0] == card.network.channels
    one = next((tmp_path / "images").iterdir())
    files = read_model(str(model), RegistrySettings())
    predict_input(files, str(tmp_path / "images"), str(tmp_path / "out"), PredictSettings())
    found = Model(network, card).predict(one)
    with Image.open(tmp_path / f"out/masks/{one.stem}.png") as mask:
        assert np.array_equal(np.asarray(mask), found.class_ids)
    assert found.overlay().size == (SIDE, SIDE) and found.pixels.shape == (SIDE, SIDE, bands.count)
    assert evaluate_model(network, card, root, "train")["images"] == IMAGES
    assert write_preview(root) is not None


@pytest.mark.slow
def test_three_stages_learn_from_a_pool_of_four_bands(four_bands: str, tmp_path: Path) -> None:
    train(four_bands, tmp_path / "run", augment__strong__jitter=1.0)
    card = load_card(str(tmp_path / "run/stage3/model"))
    assert card.bands == load_manifest(four_bands).bands and card.network.channels == 4


@pytest.mark.slow
def test_four_bands_beat_their_rgb(four_bands: str, tmp_path: Path) -> None:
    learnt: dict[str, Any] = {"network__head": "deeplabv3plus", "network__head_width": 8, "network__output_stride": 16}
    learnt |= {"stages": 1, "stage1__steps": 40, "stage1__labelled_batch": 4, "training__evaluate_every": 40}
    learnt |= {"optimiser__learning_rate": 2e-2, "optimiser__encoder_learning_rate": 2e-2}
    every = train(four_bands, tmp_path / "every", **learnt)
    colours = train(four_bands, tmp_path / "colours", data__bands=[1, 2, 3], **learnt)
    assert every > colours + 0.15, (every, colours)


def test_the_readers_of_a_cluster_give_canvases_of_the_bands(four_bands: str, tmp_path: Path) -> None:
    from threestage.data.pool import data_set_files

    manifest = load_manifest(four_bands)
    file = data_set_files(four_bands, manifest)[0]
    assert manifest.bands is not None and len(pool_files(manifest)) == 3
    used = manifest.bands.model_copy(update={"used": (4, 1)})
    reader = FileReader(None, str(tmp_path), (0, "stage2"), Decoding(1, 2**20, used), (SIDE, SIDE))
    part = FilePart(file=file, pass_=0, first=0, rows=file.rows + 2, images=file.rows, block_rows=file.rows + 2)
    (block,) = reader({"part": np.array([part.model_dump_json()])})
    assert block["image"].shape == (file.rows + 2, SIDE, SIDE, 2) and block["filled"].sum() == file.rows


def test_the_bands_are_part_of_what_a_run_depends_on(four_bands: str) -> None:
    root = Path(four_bands)
    plain, some = (stage_keys(local_config(root, data__bands=used), "stage1") for used in (None, [4]))
    assert some.pop("data.bands") == [4] and plain == some
    with refused("data/no-such-band", "data.bands=[5]", four_bands):
        local_config(root, data__bands=[5]).for_manifest(load_manifest(four_bands))


def test_a_set_of_rgb_and_its_model_are_written_as_before(scenes: Path, finished_run: Path) -> None:
    assert "bands" not in json.loads((scenes / "manifest.json").read_text())
    card = json.loads((finished_run / "stage1/model/model.json").read_text())
    assert "bands" not in card and "channels" not in card["network"]


def test_a_data_set_keeps_its_bands(four_bands: str, scenes: Path, tmp_path: Path) -> None:
    before, photos = load_manifest(four_bands), tmp_path / "more"
    photos.mkdir()
    (photos / "new.png").write_bytes(KINDS["4 bands"][2](np.zeros((SIDE, SIDE, 4))))
    (photos / "other.png").write_bytes(KINDS["8-bit grey"][2](np.zeros((SIDE, SIDE, 4))))
    settings = IngestSettings(format="images", max_bad_fraction=1)
    report = ingest(str(photos), four_bands, settings)
    assert report.manifest.bands == before.bands and (report.added_images, report.bad) == (1, 1)
    assert report.rejected[0].reason.endswith("[image/bands]")
    for root, asked in ((four_bands, 3), (str(scenes), 4)):
        with refused("data/other-bands", f"bands={asked}", root):
            ingest(str(photos), root, settings.model_copy(update={"bands": asked}))


def test_the_registered_model_scales_as_threestage_does() -> None:
    bands = Bands(count=4, low=(0, 100, -3, 5), high=(255, 900, 3, 5), used=(4, 2, 3))
    images = np.random.default_rng(0).uniform(-10, 1000, (2, 5, 7, 4)).astype(np.float32)
    images[0, 0, 0] = np.nan
    found = packed_model()._levels(images, bands.model_dump(mode="json"))
    expected = np.stack([bands.levels(image) for image in images])
    assert np.abs(found.astype(int) - expected).max() <= 1 and found.shape == (2, 5, 7, 3)
    with pytest.raises(ValueError, match="4"):
        packed_model()._levels(images[..., :3], bands.model_dump(mode="json"))


def test_a_server_decodes_for_its_model() -> None:
    bands, seen = Bands(count=4, low=(0,) * 4, high=(255,) * 4), list[Levels]()

    def predict(image: Levels) -> Any:
        seen.append(image)
        raise KeyError

    image = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    with pytest.raises(KeyError):
        answer_image(encoded(Image.fromarray(image)), "mask", predict, bands)
    assert np.array_equal(seen[0], image)
    assert answer_image(encoded(Image.fromarray(image[..., 0])), "mask", predict, bands).status == 422
