"""`threestage report`: read a run, predict some validation images, and write one page that loads nothing and needs no script.
sections.py decides what it shows, template.html.j2 how."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import threestage
from threestage.data import storage
from threestage.data.storage_errors import explain
from threestage.errors import InputError, StageFailure
from threestage.report import sections
from threestage.report.run_reader import Run, Stage, read_run
from threestage.report.validation_images import OnImages, StageMeasure, Validation, choose
from threestage.run_folder.reuse import PAGE_NAME
from threestage.training.metrics import MEAN_IOU_RULE

IMAGES = 9
INTRODUCTION = "Three-stage self-training for semantic segmentation, seen through the run's validation images."
TITLE = "the stages compared"  # ends the title of every page, of earlier versions too
HEAD_BYTES = 4096


@dataclass(frozen=True)
class Written:
    """`missing`: what the page says of what it could not show."""

    uri: str
    size: int  # bytes
    finished: bool
    missing: tuple[str, ...]


def write_report(
    run: str,
    out: str | None = None,
    images: int = IMAGES,
    measure: int | None = None,
    data: str | None = None,
    show: OnImages = lambda done, total: None,
) -> Written:
    """Write the page to `out`, or into the run's folder.

    images: how many validation images are shown. measure: on how many the stages are measured; None is all of them, or on a
    CPU as many as `Validation.affordable` says. data: the data set's root, where it is not where the run found it.

    Raises InputError where the folder holds no run, or `data` is not the run's data set.
    """
    found = read_run(run)
    uri = out or storage.join(found.uri, PAGE_NAME)
    _refuse_other_file(uri)
    seen, missing = None, list(found.missing)
    if found.stages:
        try:
            seen = _look(found, data, images, measure, show)
        except (InputError, StageFailure, OSError) as error:
            if data is not None:
                raise
            known = explain(None, error) if isinstance(error, OSError) else error
            missing.append(f"No pictures and no calibration: {known.message}.")
    parts = sections.all_sections(found, seen)
    page = render(found.name, found.verdict or INTRODUCTION, found.stages, parts, missing)
    content = page.encode("utf-8", "replace")
    storage.write_bytes(uri, content)
    return Written(uri, len(content), found.finished, tuple(missing))


def _refuse_other_file(uri: str) -> None:
    """Raises InputError where a file that is no page of ours would be overwritten."""
    if not storage.exists(uri):
        return
    files, path = storage.filesystem(uri)
    with files.open_input_stream(path) as stream:
        if f"{TITLE}</title>".encode() not in stream.read(HEAD_BYTES):
            raise InputError(
                f"{uri}: exists, and is no page of threestage report; give another --out", "data/foreign-file"
            )


def _look(run: Run, data: str | None, images: int, measure: int | None, show: OnImages) -> sections.Seen:
    root = data or run.data_root
    if root is None:
        raise InputError(
            f"{run.uri}: the run does not name its data set before its end; give it with --data", "report/no-data-set"
        )
    validation = Validation(run, root)
    measured = validation.measure(measure or validation.affordable(images), show)
    if measured[-1].pixels == 0:
        raise InputError(
            f"{root}: every pixel of the measured validation images is ignored; give more of them with --measure, or another "
            "data set with --data",
            "report/nothing-to-measure",
        )
    chosen = validation.examples(choose(measured[-1].image_iou, images), measured)
    classes, colours = validation.manifest.classes, validation.manifest.colours
    return sections.Seen(
        examples=[sections.example_of(example, run.stages, classes, colours) for example in chosen],
        measures=measured,
        measured_on=_measured_on(run, validation, measured),
        classes=classes,
        colours=colours,
        label_pixels=validation.label_pixels(),
    )


def _measured_on(run: Run, validation: Validation, measured: Sequence[StageMeasure]) -> str:
    """On how many images, and whether they are the run's."""
    number, wanted = len(measured[-1].image_iou), len(run.split.validation)
    text = f"Measured for this page on {'all' if number == wanted else f'{number} of the'} {wanted} validation images"
    text += "." if number == wanted else ", evenly spread."
    if validation.changed:
        text += (
            " The data set's validation images have changed since the run: the run's own scores are of the former ones."
        )
    return text


def render(
    name: str,
    intro: str,
    stages: Sequence[Stage],
    parts: Mapping[str, sections.Section | None],
    missing: Sequence[str] = (),
) -> str:
    """The page. `parts`: of `all_sections`; `missing`: sentences about what it does not show."""
    return render_page(
        "template.html.j2",
        "report",
        title=f"{name}: {TITLE}",
        intro=intro,
        stages=stages,
        parts=parts,
        missing=missing,
        mean_iou_rule=MEAN_IOU_RULE,
    )


def render_page(template: str, command: str, **values: Any) -> str:
    """A page by a template that extends page.html.j2; `command` made it."""
    now = datetime.datetime.now(datetime.UTC)
    values |= {"command": command, "version": threestage.__version__, "now": now}
    return _templates().get_template(template).render(values)


@cache
def _templates() -> Environment:
    """The templates of pages, each compiled once a process: that takes longer than filling it in."""
    templates = Environment(
        loader=PackageLoader("threestage.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update({form.__name__: form for form in sections.FORMS})
    return templates
