"""What people and strangers hand to `threestage predict`: names that clash, odd Parquet, JSON and images that are bombs."""

import io
import os
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.bad_inputs import BadInput, Ended, refused, threestage
from threestage.models.export import ModelCard, save_model
from threestage.models.network import build_network
from threestage.models.settings import NetworkSettings


def png(side: int = 40, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@cache
def network() -> tuple[NetworkSettings, object]:
    settings = NetworkSettings(encoder="test_resnet", batch_norm="live", dilations=(1, 2))
    return settings, build_network(settings, 2)


def predict(folder: Path, source: str = "photos", *options: object) -> Ended:
    settings, built = network()
    card = ModelCard(network=settings, classes=("a", "b"), colours=((0, 0, 0), (9, 9, 9)), downscale=1, stage="stage1")
    save_model(str(folder / "model"), built, card)  # type: ignore[arg-type]
    given = ("--local", "--max-bad-fraction", 0.9, *options)
    return threestage("predict", folder / "model", folder / source, folder / "out", *given)


def outcome(folder: Path, done: Ended) -> str:
    """`refused [code]`, or how many masks there are and how many images were left out."""
    if done.code:
        return refused(done)
    masks = sum(path.is_file() for path in (folder / "out/masks").rglob("*"))
    *_, left_out = re.findall(r"(\d+) left out", done.text)
    return f"{masks} masks, {left_out} left out"


def photos(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(png(seed=seed))
    return folder / "photos"


def named(*names: str) -> Callable[[Path], str]:
    def try_it(folder: Path) -> str:
        photos(folder, *names)
        return outcome(folder, predict(folder))

    return try_it


def replaced(folder: Path) -> str:
    source = photos(folder, "a.png", "b.png")
    predict(folder)
    before = (folder / "out/masks/b.png").stat().st_mtime_ns
    (source / "a.png").write_bytes(png(64))
    done = predict(folder)
    kept = "the other kept" * ((folder / "out/masks/b.png").stat().st_mtime_ns == before)
    with Image.open(folder / "out/masks/a.png") as mask:
        return f"{outcome(folder, done)}, mask of {mask.width} pixels, {kept}"


def wide(folder: Path) -> str:
    Image.new("RGB", (65_501, 1)).save(photos(folder, "a.png") / "wide.png")
    return outcome(folder, predict(folder))


def tables(write: Callable[[Path], None]) -> Callable[[Path], str]:
    """One more table beside one of two good rows."""

    def try_it(folder: Path) -> str:
        (folder / "photos").mkdir()
        pq.write_table(pa.table({"image": [png(), png()]}), folder / "photos/good.parquet")
        write(folder / "photos/bad.parquet")
        return outcome(folder, predict(folder))

    return try_it


def of_ids(ids: pa.Array, file: Path) -> None:
    pq.write_table(pa.table({"image_id": ids, "image": [png()] * len(ids)}), file)


def raw_strings(*values: bytes) -> pa.Array:
    offsets = pa.array(np.cumsum([0, *map(len, values)]), pa.int32())
    return pa.StringArray.from_buffers(len(values), offsets.buffers()[1], pa.py_buffer(b"".join(values)))


def two_columns(name: str, file: Path) -> None:
    values = [png(), png()]
    pq.write_table(pa.Table.from_arrays([pa.array(values)] * 2, [name, name]), file)


def cut(end: int, file: Path) -> None:
    pq.write_table(pa.table({"image": [png(), png()]}), file)
    file.write_bytes(file.read_bytes()[:end])


def damaged_page(file: Path) -> None:
    pq.write_table(
        pa.table({"image": [png(seed=seed) for seed in range(4)]}), file, row_group_size=2, use_dictionary=False
    )
    start = pq.read_metadata(file).row_group(0).column(0).data_page_offset
    content = file.read_bytes()
    file.write_bytes(content[:start] + b"\xff" * 40 + content[start + 40 :])


def many_bytes(file: Path) -> None:
    ids = pa.DictionaryArray.from_arrays(pa.array([0] * 10, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"image_id": ids, "image": [png()] * 10}), file, store_schema=False)


def manifest(make: Callable[[Path], object]) -> Callable[[Path], str]:
    def try_it(folder: Path) -> str:
        make(photos(folder, "a.png", "b.png") / "manifest.json")
        return outcome(folder, predict(folder))

    return try_it


def sparse(file: Path) -> None:
    with open(file, "wb") as stream:
        stream.truncate(40 * 2**30)


def both(folder: Path) -> str:
    (folder / "other").mkdir()
    (folder / "other/b.png").write_bytes(png())
    threestage("ingest", folder / "other", folder / "photos", "--format", "images", "--local")
    (folder / "photos/a.png").write_bytes(png())
    return outcome(folder, predict(folder))


def one_file(folder: Path) -> str:
    photos(folder, "a.png", "b.png")
    return outcome(folder, predict(folder, "photos/a.png"))


def no_image(folder: Path) -> str:
    (folder / "notes.txt").write_text("hello")
    return outcome(folder, predict(folder, "notes.txt"))


BAD_INPUTS = [
    BadInput("images a.jpg, a.png, a.png.jpg", "3 masks, 0 left out", named("a.jpg", "a.png", "a.png.jpg")),
    BadInput("an image a.jpg, and a folder a.png of others", "2 masks, 0 left out", named("a.jpg", "a.png/b.jpg")),
    BadInput(
        "an image replaced in place after it was predicted",
        "2 masks, 0 left out, mask of 64 pixels, the other kept",
        replaced,
    ),
    BadInput("an image too wide for a JPEG overlay", "2 masks, 0 left out", wide),
    BadInput(
        "Parquet ids of a time that Python has not",
        "3 masks, 1 left out",
        tables(partial(of_ids, pa.array([2**62, 1], pa.timestamp("us")))),
    ),
    BadInput(
        "Parquet ids that are lists of broken UTF-8",
        "3 masks, 1 left out",
        tables(partial(of_ids, pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), raw_strings(b"\xff", b"a")))),
    ),
    BadInput(
        "Parquet ids that are a dictionary of broken UTF-8",
        "2 masks, 2 left out",
        tables(
            partial(of_ids, pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), raw_strings(b"\xff", b"a")))
        ),
    ),
    BadInput("Parquet with two columns image", "2 masks, 1 left out", tables(partial(two_columns, "image"))),
    BadInput("Parquet without a footer", "2 masks, 1 left out", tables(partial(cut, -20))),
    BadInput("Parquet with a damaged page", "4 masks, 2 left out", tables(damaged_page)),
    BadInput("Parquet of 10 ids of a megabyte each in few bytes", "2 masks, 10 left out", tables(many_bytes)),
    BadInput(
        "a manifest.json of somebody else's beside images",
        "2 masks, 0 left out",
        manifest(lambda file: file.write_text('{"name": "page"}')),
    ),
    BadInput("the same, a pipe", "2 masks, 0 left out", manifest(os.mkfifo)),
    BadInput(
        "the same, a link to /dev/zero", "2 masks, 0 left out", manifest(lambda file: file.symlink_to("/dev/zero"))
    ),
    BadInput("the same, 40 GB", "2 masks, 0 left out", manifest(sparse)),
    BadInput(
        "the same, 100,000 brackets", "2 masks, 0 left out", manifest(lambda file: file.write_text("[" * 100_000))
    ),
    BadInput("a folder that holds images and a data set", "refused [predict/two-inputs]", both),
    BadInput("one image as the input", "1 masks, 0 left out", one_file),
    BadInput("a text file as the input", "refused [predict/no-images]", no_image),
]
