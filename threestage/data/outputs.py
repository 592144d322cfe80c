"""Folders that commands write into. One that holds something else is refused, so nothing of the user's is overwritten."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from threestage.data import storage
from threestage.errors import InputError

PASSED_OVER = ("lost+found/",)  # of a file system that is mounted there
SHOWN = 3


class Output(NamedTuple):
    """What a command makes of a folder. `marks`: the files that show it is one, each with a key of its JSON object; a command
    writes one of them first, so that it can continue after a kill. `leased`: a driver's lease may come before them."""

    name: str
    marks: Mapping[str, str]
    leased: bool = False


DATA_SET_MARK = "ingest.json"
DEMO_MARK = "demo.json"
TRAIN_MARK = "train.json"
LEASE = {"lease.json": "beat"}

DATA_SET = Output("a data set", {DATA_SET_MARK: "made_by", "manifest.json": "format"})
LISTING = Output("a listing", {"partitions.json": "ranges"})
PREDICTIONS = Output("predictions", {"prediction.json": "model"})
RUN = Output(
    "a run", {"split.json": "split", DEMO_MARK: "made_by", TRAIN_MARK: "made_by", "budget.json": "budget"}, leased=True
)
SWEEP = Output("a sweep", {"sweep.json": "sweep_key"}, leased=True)
PULLED_MODEL = Output("a pulled model", {"lineage.json": "model_digest"})
SCORES = Output("scores", {"metrics.json": "per_class_iou"})
EXPORT_MARK = "export.json"
EXPORT = Output("exported labels", {EXPORT_MARK: "exported_from"})
SELECTION_MARK = "next.json"
SELECTION = Output("images to label next", {SELECTION_MARK: "strategy"})
SUSPECTS_MARK = "suspects.json"
SUSPECTS = Output("suspect labels", {SUSPECTS_MARK: "folds"})
FORECAST_MARK = "forecast.json"
FORECAST = Output("a forecast", {FORECAST_MARK: "shares"})
OUTPUTS = (DATA_SET, LISTING, PREDICTIONS, RUN, SWEEP, PULLED_MODEL, SCORES, EXPORT, SELECTION, SUSPECTS, FORECAST)


def claim(folder: str, output: Output) -> None:
    """Check that a command may write into a folder and delete in it: it is absent or empty, or holds such an output.

    Raises InputError that names what is there.
    """
    try:
        if is_marked(folder, output):
            return
        found = [name for name in storage.first_names(folder) if not _passed_over(name)]
    except NotADirectoryError:
        raise InputError(
            f"{folder}: is a file, or lies below one; give another folder", "data/foreign-folder"
        ) from None
    if not found or is_marked(folder, output):  # another command may have begun meanwhile
        return
    other = _other(folder, output)
    if other is None and output.leased and _has_one(folder, LEASE):
        return
    names = ", ".join(found[:SHOWN]) + (" and more" if len(found) > SHOWN else "")
    marks = " or ".join(output.marks)
    raise InputError(
        f"{folder}: holds {other or f'{names}, which {marks} does not mark as {output.name}'}; nothing was changed; give "
        "another folder, a new or an empty one",
        "data/foreign-folder",
    )


def _other(folder: str, output: Output) -> str | None:
    """The name of another output that a folder holds."""
    for other in OUTPUTS:
        with contextlib.suppress(InputError):  # a file of that name that is no JSON
            if other is not output and is_marked(folder, other):
                return other.name
    return None


def is_marked(folder: str, output: Output) -> bool:
    """Whether a folder holds a file that shows that a command made this output there."""
    return _has_one(folder, output.marks)


def mark(folder: str, name: str, made_by: str) -> None:
    """Write the mark of an output whose own records come last."""
    storage.write_json(storage.join(folder, name), {"made_by": made_by})


def _has_one(folder: str, marks: Mapping[str, str]) -> bool:
    return any(key in _object(storage.join(folder, name)) for name, key in marks.items())


def _object(uri: str) -> Iterable[str]:
    """The keys of a JSON object; none where there is no file, or another value."""
    found = storage.read_json(uri) if storage.is_file(uri) else None
    return found if isinstance(found, dict) else ()


def _passed_over(name: str) -> bool:
    """What a killed write leaves, and the file system's own."""
    return name in PASSED_OVER or (name.startswith(".") and name.rstrip("/").endswith(storage.TEMPORARY_SUFFIX))
