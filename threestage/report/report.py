"""`threestage report`: read a run, predict some validation images, and write one page that loads nothing and needs no script.
Its parts are in sections.py, its charts in charts.py."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import threestage
from threestage.data import storage
from threestage.data.storage_errors import explain
from threestage.errors import InputError, StageFailure
from threestage.report import sections as parts
from threestage.report.charts import Html, join_html, patterns, tag
from threestage.report.run_reader import Run, read_run
from threestage.report.validation_images import OnImages, StageMeasure, Validation, choose
from threestage.run_folder.reuse import PAGE_NAME

# ---- The document around the sections

# Even a mistake in the page could not make a browser fetch or run anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
TITLE = "the stages compared"  # ends the title of every page, of earlier versions too
NAMES = {
    "overview": "At a glance",
    "images": "Pictures",
    "classes": "Classes",
    "curves": "Learning",
    "uncertainty": "Uncertainty",
    "pseudo-masks": "Pseudo-masks",
    "rejected": "Rejected",
    "time": "Time",
    "settings": "Settings",
}


def page(name: str, intro: str, sections: Sequence[tuple[str, Html]]) -> str:
    """`sections`: (a key of NAMES, markup) in their order."""
    title = f"{name}: {TITLE}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(_style())),
    )
    links = tag("ul", *(tag("li", tag("a", NAMES[key], href=f"#{key}")) for key, _ in sections))
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        patterns(),
        tag("header", tag("h1", title), tag("p", intro)),
        tag("nav", links, aria_label="Parts of this page"),
        tag("main", join_html(markup for _, markup in sections), id="content"),
        tag("footer", _made()),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _style() -> str:
    return resources.files("threestage.report").joinpath("style.css").read_text("utf-8")


def _made() -> str:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    made = f"Made by threestage {threestage.__version__} on {now} with `threestage report`."
    return f"{made} The page loads nothing and runs no script."


# ---- Write the report of a run

IMAGES = 9
INTRODUCTION = "Three-stage self-training for semantic segmentation, seen through the run's validation images."
HEAD_BYTES = 4096


@dataclass(frozen=True)
class Written:
    """`missing`: what the page says of what it could not show."""

    uri: str
    size: int  # bytes
    finished: bool
    missing: tuple[str, ...]


@dataclass(frozen=True)
class _Seen:
    """What the validation images and the labels gave."""

    images: Html
    uncertainty: Html
    label_pixels: Sequence[int]


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
    content = page(found.name, found.verdict or INTRODUCTION, _sections(found, seen, missing)).encode(
        "utf-8", "replace"
    )
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


def _look(run: Run, data: str | None, images: int, measure: int | None, show: OnImages) -> _Seen:
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
    said = _measured_on(run, validation, measured)
    examples = validation.examples(choose(measured[-1].image_iou, images), measured)
    manifest = validation.manifest
    return _Seen(
        images=parts.image_section(run.stages, examples, manifest.classes, manifest.colours, said),
        uncertainty=parts.uncertainty(run, measured, said),
        label_pixels=validation.label_pixels(),
    )


def _sections(run: Run, seen: _Seen | None, missing: Sequence[str]) -> list[tuple[str, Html]]:
    found = [("overview", parts.overview(run, missing))]
    if seen is not None:
        found.append(("images", seen.images))
    if run.stages:
        found += [("classes", parts.classes(run)), ("curves", parts.curves(run))]
    if seen is not None:
        found.append(("uncertainty", seen.uncertainty))
    if run.stages:
        found += [
            ("pseudo-masks", parts.pseudo_masks(run, None if seen is None else seen.label_pixels)),
            ("rejected", parts.rejected(run)),
            ("time", parts.times(run)),
        ]
    return [*found, ("settings", parts.settings(run))]


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
