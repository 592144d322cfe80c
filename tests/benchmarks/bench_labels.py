"""How much memory a labelling tool's export takes on its way in, and predictions on their way out.

`python -m tests.benchmarks.bench_labels [--images 100000] [--json FILE]`: images of 16×12 pixels and a COCO file of ten polygons
each. `in`: the first ingest; `again`: the same once more; `corrected`: once more after every image was corrected; `out coco`,
`out label-studio`: `labels export` of predictions of 64×48 pixels. Each in a fresh process; MiB are its peak above its start.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.measure import report

IN, OUT = ("in", "again", "corrected"), ("coco", "label-studio")
CLASSES = ("road", "car", "tree")
WIDTH, HEIGHT = 16, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], Path(given.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measured(Path(folder), given.images))
    report(f"{given.images:,} images", rows, given.json)


def measured(folder: Path, images: int) -> Iterator[dict[str, Any]]:
    write_photos(folder / "photos", images)
    write_export(folder / "export.json", images, 0)
    for step in IN:
        if step == "corrected":
            write_export(folder / "export.json", images, 1)
        yield in_a_fresh_process(step, folder)
    write_predictions(folder / "predictions", images)
    for to in OUT:
        yield in_a_fresh_process(f"out {to}", folder)


def in_a_fresh_process(step: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_labels", "--one", step, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"step": step, **json.loads(done.stdout.splitlines()[-1])}


def one(step: str, folder: Path) -> dict[str, float]:
    from threestage.data.ingest import IngestSettings, ingest
    from threestage.labels.label_export import ExportSettings, export_labels

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if step in IN:
        settings = IngestSettings(format="coco", masks=f"{folder}/export.json")
        done = ingest(f"{folder}/photos", f"{folder}/data", settings).added_labels
    else:
        to = step.removeprefix("out ")
        done = export_labels(f"{folder}/predictions", f"{folder}/{to}", ExportSettings(to=to)).images
    above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"done": done, "MiB above the start": round(above), "seconds": round(time.monotonic() - began)}


def name_of(number: int) -> str:
    return f"{number // 1000:03d}/{number:06d}.png"


def write_photos(folder: Path, images: int) -> None:
    """No two of the same bytes."""
    for number in range(images):
        pixels = np.full((HEIGHT, WIDTH, 3), number % 251, np.uint8)
        pixels[0, 0] = np.frombuffer(number.to_bytes(3, "big"), np.uint8)
        path = folder / name_of(number)
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path, compress_level=1)


def write_export(path: Path, images: int, shift: int) -> None:
    """Regions first, so that none is known to be of an image when it is read."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, WIDTH, (100, 10, 40)).round(2).tolist()
    with path.open("w") as file:
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
        file.write(f'{{"categories":{json.dumps(categories)},"annotations":[')
        for number in range(images):
            for place, ring in enumerate(corners[(number + shift) % 100]):
                entry = {"image_id": number, "category_id": place % 3, "segmentation": [ring]}
                file.write("," * (number + place > 0) + json.dumps(entry) + "\n")
        file.write('],"images":[')
        for number in range(images):
            entry = {"id": number, "file_name": name_of(number), "height": HEIGHT, "width": WIDTH}
            file.write("," * (number > 0) + json.dumps(entry) + "\n")
        file.write("]}")


def write_predictions(folder: Path, images: int) -> None:
    """As `threestage predict --format parquet --confidence` leaves them."""
    import pyarrow as pa

    from threestage.data import storage
    from threestage.prediction.predict import ROWS_SCHEMA

    storage.write_json(f"{folder}/prediction.json", {"model": "0" * 16, "input": f"{folder}/none"})
    storage.write_json(f"{folder}/classes.json", [[name, [n, n, n]] for n, name in enumerate(CLASSES)])
    rng, masks = np.random.default_rng(0), []
    for _ in range(64):
        stream = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 3, (12, 16), np.uint8))
        coarse.resize((64, 48), Image.Resampling.NEAREST).save(stream, "PNG")
        masks.append(stream.getvalue())
    sure = bytes(64 * 48)
    for first in range(0, images, 256):
        numbers = range(first, min(first + 256, images))
        rows = [{"image_id": name_of(n)[:-4], "mask": masks[n % 64], "confidence": sure} for n in numbers]
        storage.write_table(f"{folder}/parts/{first:016d}.parquet", pa.Table.from_pylist(rows, ROWS_SCHEMA))


if __name__ == "__main__":
    main()
