"""Label Studio: the JSON export, with brushes, polygons and ellipses; or with the PNGs of brushes (label_studio_pngs.py).

Of a task's annotations the one marked as ground truth counts, else the last that was not cancelled. Predictions are no labels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pydantic import Field

from threestage.data import storage
from threestage.data.classes import Colour
from threestage.errors import InputError
from threestage.labels.annotations import Annotations
from threestage.labels.export_files import CODE, ExportFiles, ToolModel, as_model
from threestage.labels.json_stream import elements
from threestage.labels.label_studio_pngs import add_brush_pngs, brush_pngs
from threestage.labels.output_files import (
    Add,
    ExportedImage,
    ExportedRegion,
    as_json,
    hex_colour,
    streamed,
    xml_attribute,
)
from threestage.labels.rasterise import Region, Size
from threestage.labels.rle import brush_code

KINDS = ("brush", "polygon", "ellipse")
LOCAL_FILES = "d="


class Result(ToolModel):
    """A part of an annotation: a shape with its label (`brushlabels`), or one of the two, which share an id."""

    id: str | None = None
    type: str
    value: dict[str, Any] = Field(default_factory=dict)  # a relation has none
    original_width: int | None = None
    original_height: int | None = None


class TaskAnnotation(ToolModel):
    result: list[Result]
    was_cancelled: bool = False
    ground_truth: bool = False


class Task(ToolModel):
    """`data` is missing in JSON-MIN, where its keys are the task's."""

    id: int | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    annotations: tuple[TaskAnnotation, ...] = ()


def read_label_studio(files: ExportFiles, into: Annotations) -> None:
    """The tasks of every JSON file there; where the brushes lie beside it as PNGs, those."""
    pngs = brush_pngs(files)
    for uri in files.ending(".json").values():
        for number, (_, value) in enumerate(elements(uri)):
            task, key = as_model(value, Task, f"{uri}: task {number}"), f"{uri}:{number}"
            if not pngs:
                _add_task(task, key, into)
            elif task.id in pngs:
                into.add_image(key, _image_name(task.data or value), None)
                add_brush_pngs(pngs.pop(task.id), files, value, key, into)
    if not into.images:
        beside = ", beside the PNGs, which name only their tasks" if pngs else ""
        raise files.wrong(f"no task in a JSON file there; export the project as JSON{beside}")
    if pngs:
        into.passed_over["masks of tasks that no JSON file there has"] += sum(map(len, pngs.values()))


def _add_task(task: Task, key: str, into: Annotations) -> None:
    done = [annotation for annotation in task.annotations if not annotation.was_cancelled]
    if not done:
        into.passed_over["tasks without an annotation"] += 1
        return
    chosen = next((annotation for annotation in done if annotation.ground_truth), done[-1])
    size = next((found for result in chosen.result if (found := _size(result))), None)
    into.add_image(key, _image_name(task.data), size)
    labels = {result.id: label for result in chosen.result if result.id and (label := _label(result))}
    for result in chosen.result:
        label = _label(result) or labels.get(result.id or "")
        try:
            region = None if label is None else _region(label, result)
        except (LookupError, TypeError, ValueError) as error:
            what = f"{key.rpartition(':')[0]}: a damaged result of type {result.type} ({error!r}); export it again"
            raise InputError(what, CODE) from None
        if region is not None:
            into.add_category(region.category, region.category)
            into.add_region(key, region)
        elif result.type.removesuffix("labels"):
            into.passed_over[f"results of type {result.type}"] += 1


def _size(result: Result) -> Size | None:
    width, height = result.original_width, result.original_height
    return None if width is None or height is None else (height, width)


def _label(result: Result) -> str | None:
    found = result.value.get(result.type) if result.type.endswith("labels") else None
    return str(found[0]) if isinstance(found, list) and found else None


def _image_name(data: dict[str, Any]) -> str:
    """The path in the image's URL: /data/upload/1/0a1b2c3d-a.jpg, /data/local-files/?d=a.jpg, s3://bucket/a.jpg."""
    url = data.get("image") or next((value for value in data.values() if isinstance(value, str)), "")
    parts = urlsplit(str(url))
    local = next((part for part in parts.query.split("&") if part.startswith(LOCAL_FILES)), None)
    path = unquote(parts.path if local is None else local.removeprefix(LOCAL_FILES))
    return path.rsplit("/", 1)[-1] if path.startswith("/data/upload/") else path.lstrip("/")


def _region(label: str, result: Result) -> Region | None:
    value, size = result.value, _size(result)
    kind = result.type.removesuffix("labels")
    if kind not in KINDS or size is None:
        return None
    if kind == "brush":
        return Region(label, "brush", value["rle"]) if "rle" in value else None
    x_scale, y_scale = size[1] / 100, size[0] / 100
    if kind == "polygon":
        return Region(label, "polygons", [[n for x, y in value["points"] for n in (x * x_scale, y * y_scale)]])
    centre, radii = (
        [value["x"] * x_scale, value["y"] * y_scale],
        [value["radiusX"] * x_scale, value["radiusY"] * y_scale],
    )
    return Region(label, "ellipse", [*centre, *radii, value.get("rotation", 0)])


# ---- Written: predictions, which the tool shows as a start to correct


@contextmanager
def write_label_studio(folder: str, classes: Sequence[tuple[str, Colour]]) -> Iterator[Add]:
    """FOLDER/tasks.json to import, and label_config.xml, the labelling interface that it fits."""
    labels = "".join(f'\n    <Label value={xml_attribute(name)} background="{hex_colour(c)}"/>' for name, c in classes)
    tags = "".join(
        f'\n  <{tag} name="{name}" toName="image">{labels}\n  </{tag}>'
        for name, tag in (("brush", "BrushLabels"), ("polygon", "PolygonLabels"))
    )
    config = f'<View>\n  <Image name="image" value="$image" zoom="true"/>{tags}\n</View>\n'
    storage.write_bytes(storage.join(folder, "label_config.xml"), config.encode())
    numbers = count()
    with streamed(storage.join(folder, "tasks.json")) as write:
        write("[")

        def add(image: ExportedImage) -> None:
            results = [one for region in image.regions for one in _results(classes[region.class_id][0], region)]
            task = {"data": {"image": f"/data/local-files/?d={quote(image.name)}"}}
            task |= {"predictions": [{"model_version": "threestage", "result": results}]}  # type: ignore[dict-item]
            write("," * (next(numbers) > 0) + "\n" + as_json(task))

        yield add
        write("]\n")


def _results(label: str, region: ExportedRegion) -> Iterator[dict[str, Any]]:
    height, width = region.inside.shape
    common = {"to_name": "image", "original_width": width, "original_height": height, "image_rotation": 0}
    if region.polygons is None:
        value: dict[str, Any] = {"format": "rle", "rle": brush_code(region.inside), "brushlabels": [label]}
        yield {**common, "id": f"c{region.class_id}", "type": "brushlabels", "from_name": "brush", "value": value}
        return
    for number, ring in enumerate(region.polygons):
        points = (ring * [100 / width, 100 / height]).tolist()
        value = {"points": points, "closed": True, "polygonlabels": [label]}
        name = f"c{region.class_id}-{number}"
        yield {**common, "id": name, "type": "polygonlabels", "from_name": "polygon", "value": value}
