"""Why: every trainer and predictor reads images, masks and manifests through these functions."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pydantic import ValidationError

from tests.refusals import refused
from threestage.data import storage
from threestage.data.headers import BadImage
from threestage.data.records import (
    RECORD_SCHEMA,
    DataFile,
    DataSettings,
    Manifest,
    SizeStatistics,
    decode_image,
    decode_mask,
    downscale_image,
    downscale_mask,
    encode_mask,
    labelled_ids,
    labelled_rows,
    load_manifest,
    pool_files,
)


def write_part(root: str, path: str, rows: dict[str, bytes | None]) -> DataFile:
    kind, split = path.split("/")[0], path.split("/")[1].split("-")[0]
    records = [
        {"image_id": key, "image": path.encode(), "mask": mask, "height": 1, "width": 1, "source": key}
        for key, mask in rows.items()
    ]
    storage.write_table(storage.join(root, path), pa.Table.from_pylist(records, schema=RECORD_SCHEMA))
    labelled = sum(mask is not None for mask in rows.values())
    return DataFile.model_validate(
        {"path": path, "kind": kind, "split": split, "rows": len(rows), "labelled_rows": labelled, "digest": path}
    )


def manifest_of(*files: DataFile) -> Manifest:
    return Manifest(
        version=1, classes=("a",), colours=((0, 0, 0),), files=files, counts={}, sizes=SizeStatistics(), digest="d"
    )


def test_masks_survive_encoding() -> None:
    mask = np.array([[0, 1, 2], [255, 18, 254]], np.uint8)
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)
    with pytest.raises(ValueError, match="uint8"):
        encode_mask(mask.astype(np.int64))


def test_a_mask_with_a_palette_is_refused_not_greyed() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    with refused("mask/damaged", "mode P", error=BadImage):
        decode_mask(stream.getvalue())


def test_images_decode_to_writable_rgb() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.full((2, 3), 7, np.uint8)).save(stream, "PNG")
    image = decode_image(stream.getvalue())
    assert image.shape == (2, 3, 3) and image.dtype == np.uint8 and image.flags.writeable and (image == 7).all()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_downscaled_masks_hold_each_block_s_majority(height: int, width: int, factor: int, seed: int) -> None:
    mask = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), (height, width))
    small = downscale_mask(mask, factor)
    assert small.shape == (height // factor, width // factor)
    for row in range(small.shape[0]):
        for column in range(small.shape[1]):
            block = mask[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
            assert small[row, column] == np.bincount(block.ravel()).argmax()


def test_downscaled_images_hold_each_block_s_mean() -> None:
    image = np.zeros((3, 5, 3), np.uint8)
    image[:2, :2, 0] = [[1, 2], [3, 4]]
    image[:2, 2:4, 1] = 255
    small = downscale_image(image, 2)
    assert small.tolist() == [[[3, 0, 0], [0, 255, 0]]]


def test_a_later_mask_wins_and_no_image_comes_twice(tmp_path: Path) -> None:
    root = str(tmp_path)
    manifest = manifest_of(
        write_part(root, "labels/train-1.parquet", {"b": b"first", "d": b"d"}),
        write_part(root, "images/train-1.parquet", {"c": b"c", "b": None, "a": b"a"}),
        write_part(root, "images/val-1.parquet", {"v": b"v"}),
        write_part(root, "images/train-2.parquet", {"d": None, "e": None}),
        write_part(root, "labels/train-2.parquet", {"b": b"mended", "a": b"mended"}),
    )
    rows = labelled_rows(root, manifest, "train")
    assert rows.schema == RECORD_SCHEMA
    found = dict(zip(rows.column("image_id").to_pylist(), rows.column("mask").to_pylist(), strict=True))
    assert list(found.items()) == [("a", b"mended"), ("b", b"mended"), ("c", b"c"), ("d", b"d")]
    assert labelled_ids(root, manifest, "train") == list(found)
    assert labelled_rows(root, manifest, "train", ["c", "v", "e"]).column("image_id").to_pylist() == ["c"]
    assert labelled_rows(root, manifest, "test").num_rows == 0
    assert [file.path for file in pool_files(manifest)] == ["images/train-1.parquet", "images/train-2.parquet"]


def test_manifest_round_trip_and_refusals(tmp_path: Path) -> None:
    root = str(tmp_path)
    with refused("data/no-data-set", root, "threestage ingest"):
        load_manifest(root)
    manifest = manifest_of()
    storage.write_json(f"{root}/manifest.json", manifest.model_dump(mode="json"))
    assert load_manifest(root) == manifest
    with refused("data/no-data-set", "v0007.json"):
        load_manifest(root, 7)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 2, "unheard": 1}))
    with refused("data/newer-format", "format 2"):
        load_manifest(root)
    (tmp_path / "manifest.json").write_text("[]")
    with refused("data/not-a-data-set", root):
        load_manifest(root)


@pytest.mark.parametrize("labelled", [0, -1, 0.0, 1.0, 1.5, ""])
def test_labelled_is_a_count_a_fraction_or_all(labelled: int | float | str) -> None:
    with pytest.raises(ValidationError):
        DataSettings.model_validate({"root": "r", "labelled": labelled})


def pil_pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_decodes_as_pillow_does_it(mode: str, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 14, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((45, 31)).convert(mode)
    exif = picture.getexif()
    exif[0x0112] = orientation
    for settings in ({"subsampling": 0}, {"subsampling": 2, "progressive": True}):
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=80, exif=exif, **settings)
        decoded = decode_image(stream.getvalue())
        assert np.array_equal(decoded, pil_pixels(stream.getvalue())) and decoded.flags.writeable


def test_pillow_decides_about_a_jpeg_with_faults() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(stream, "JPEG")
    data = stream.getvalue()
    with refused("image/undecodable", "truncated", error=BadImage):
        decode_image(data[:-300])
    noisy = data[:-2] + b"\x11" * 40 + data[-2:]  # bytes that belong to nothing: worth a warning only
    assert np.array_equal(decode_image(noisy), pil_pixels(noisy))
