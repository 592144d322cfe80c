"""A picture of a data set's labels is drawn once for each version, and nothing of the user's is overwritten."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import write_photos
from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.listing import first_image
from threestage.data.records import PREVIEW_NAME as NAME
from threestage.report.data_set_preview import PHOTOS, write_preview

MAP = "classes:\n  - {name: ground, colour: [90, 90, 90], ids: [0]}\n  - {name: thing, colour: [255, 0, 0], ids: [1]}\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of ten images of 40×48 pixels with masks."""
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path, 10)
    Path("map.yaml").write_text(MAP)
    ingest("images", "data", IngestSettings(format="folders", masks="masks", class_map="map.yaml"))
    return str(tmp_path / "data")


def test_eight_photos_beside_their_labels(root: str) -> None:
    uri = write_preview(root)
    assert uri == f"{root}/{NAME}"
    picture = np.asarray(Image.open(uri))
    rows = PHOTOS // 2
    assert picture.shape[1] > 4 * 160 and picture.shape[0] > rows * 160 * 40 // 48
    before = Path(uri).stat().st_mtime_ns
    assert write_preview(root) == uri and Path(uri).stat().st_mtime_ns == before


def test_it_is_no_image_of_the_data_set(root: str) -> None:
    write_preview(root)
    assert first_image(root) is None
    Path(root, "mine.png").touch()
    assert first_image(root) == f"{root}/mine.png"


def test_other_colours_are_shown(root: str) -> None:
    uri = str(write_preview(root))
    before = Path(uri).read_bytes()
    Path("map.yaml").write_text(MAP.replace("[255, 0, 0]", "[0, 0, 255]"))
    ingest("images", "data", IngestSettings(format="folders", masks="masks", class_map="map.yaml"))
    write_preview(root)
    assert Path(uri).read_bytes() != before


@pytest.mark.parametrize("is_picture", [True, False])
def test_a_file_of_the_users_is_kept(root: str, is_picture: bool) -> None:
    mine = Path(root, NAME)
    if is_picture:
        Image.new("RGB", (4, 4)).save(mine)
    else:
        mine.write_text("my notes")
    before = mine.read_bytes()
    assert write_preview(root) is None and mine.read_bytes() == before


def test_without_masks_there_is_none(root: str) -> None:
    ingest("images", "pool", IngestSettings(format="images"))
    assert write_preview("pool") is None and not Path("pool", NAME).exists()


def test_on_s3(root: str, bucket: str) -> None:
    data = f"{bucket}/preview"
    ingest("images", data, IngestSettings(format="folders", masks="masks", class_map="map.yaml"))
    assert write_preview(data) == write_preview(data) == f"{data}/{NAME}"
    assert first_image(data) is None and storage.read_bytes(f"{data}/{NAME}").startswith(b"\x89PNG")
