"""The lists of images that `threestage next` and `threestage suspects` leave in a folder.

OUT/<name>.json   what was asked for, and the images with their figures
OUT/<name>.csv    the same images, one a line
OUT/images.txt    their ids, one a line, as `labels export --images` takes them
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from threestage.data import storage
from threestage.errors import InputError

LIST_NAME = "images.txt"
Progress = Callable[[str, int, int], None]
"""What is done, so much of so much; 0: it is not known."""


def begin_list(out: str, mark: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier call has written into the file `mark`; InputError where it was asked for something else."""
    uri = storage.join(out, mark)
    if not storage.exists(uri):
        storage.write_json(uri, record)
    before = dict(storage.read_json(uri, dict[str, Any]))
    for key, value in record.items():
        if before.get(key) != value:
            raise InputError(
                f"{out}: holds images chosen with {key}={before.get(key)}, not {value}; give another --out",
                "next/other-choice",
            )
    return before


def write_lists(out: str, mark: str, columns: Sequence[str], done: Mapping[str, Any]) -> None:
    """`done`: the record, with `images`. It comes last."""
    write_csv(storage.join(out, mark.replace(".json", ".csv")), columns, done["images"])
    write_ids(storage.join(out, LIST_NAME), [image["image_id"] for image in done["images"]])
    storage.write_json(storage.join(out, mark), done)


def write_csv(uri: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    storage.write_bytes(uri, table.getvalue().encode())


def write_ids(uri: str, ids: Sequence[str]) -> None:
    storage.write_bytes(uri, "".join(f"{image_id}\n" for image_id in ids).encode())
