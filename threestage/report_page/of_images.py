"""The page's pictures: chosen validation images, their truth, and what every stage makes of them."""

from collections.abc import Iterable, Sequence

import numpy as np

from threestage.data.classes import Colour
from threestage.report_page import pictures
from threestage.report_page.figures import Stage
from threestage.report_page.markup import Html, note, section, tag
from threestage.report_page.validation import Example, Group

GROUPS: dict[Group, tuple[str, str]] = {
    "worst": ("The worst images", "▼ worst"),
    "middle": ("Images from the middle", "● middle"),
    "best": ("The best images", "▲ best"),
}
CHANGES = (
    (pictures.STILL_RIGHT, "right before and after"),
    (pictures.BECAME_RIGHT, "became right"),
    (pictures.BECAME_WRONG, "became wrong (striped)"),
    (pictures.STILL_WRONG, "wrong before and after"),
)


def images(
    stages: Sequence[Stage],
    examples: Iterable[Example],
    classes: Sequence[str],
    colours: Sequence[Colour],
    measured: str,
) -> Html:
    """Every chosen image as a grid: a column for the image and its truth, then a column a stage."""
    shown = pictures.class_colours(colours)
    by_group: dict[Group, list[Html]] = {group: [] for group in GROUPS}
    for example in examples:
        by_group[example.group].append(_article(example, stages, classes, shown))
    groups = [
        tag("div", tag("h3", GROUPS[group][0]), tag("div", *articles, class_="examples"))
        for group, articles in by_group.items()
        if articles
    ]
    last = stages[-1].title
    return section(
        "images",
        "Stages side by side",
        note(
            f"Validation images, picked by the mean IoU that {last} reaches on each of them: the worst, some around the "
            f"median, the best. {measured} The mean IoU of one image counts the classes that are in it or were predicted."
        ),
        _how_to_read_pictures(classes, shown),
        _choices(),
        *groups,
    )


def _how_to_read_pictures(classes: Sequence[str], colours: Sequence[Colour]) -> Html:
    swatches = [
        _swatch(colour, f"{number} {name}") for number, (name, colour) in enumerate(zip(classes, colours, strict=True))
    ]
    changed = [_swatch(pictures.CHANGE_COLOURS[kind], name, kind == pictures.BECAME_WRONG) for kind, name in CHANGES]
    scale = tag("li", tag("span", class_="scale"), "confidence 0 (dark) to 1 (bright)")
    return tag(
        "figure",
        tag("ul", *swatches, _swatch((0, 0, 0), "ignored"), class_="key", aria_label="Classes"),
        tag("ul", *changed, scale, class_="key", aria_label="Changes and confidence"),
        tag(
            "figcaption",
            tag("b", "How to read it. "),
            "The first column is the image and its truth. Each further column is a stage: what it predicts, how sure it is, "
            "and which pixels it changed against the stage before (for the first stage: which are right). The widest place of "
            "every class carries the class's number. Large images are shown reduced; counts are of all pixels.",
        ),
        class_="legend",
    )


def _swatch(colour: Colour, name: str, striped: bool = False) -> Html:
    style = f"background-color:rgb({colour[0]},{colour[1]},{colour[2]})"
    return tag("li", tag("span", class_="swatch striped" if striped else "swatch", style=style), name)


def _choices() -> Html:
    """Radio buttons and check boxes that the style sheet alone obeys."""
    sizes = [
        tag("label", tag("input", type="radio", name="size", id=f"size-{size}", checked=size == "medium"), size)
        for size in ("small", "medium", "large")
    ]
    rows = [
        tag("label", tag("input", type="checkbox", id=f"show-{row}", checked=True), name)
        for row, name in (("confidence", "confidence"), ("changes", "changes"))
    ]
    return tag(
        "div",
        tag("fieldset", tag("legend", "Picture size"), *sizes),
        tag("fieldset", tag("legend", "Rows"), *rows),
        class_="choices",
    )


def _article(example: Example, stages: Sequence[Stage], classes: Sequence[str], colours: Sequence[Colour]) -> Html:
    scores = " → ".join(f"{score:.3f}" for score in example.scores)
    columns = [_truth_column(example, classes, colours)]
    columns += [_stage_column(example, place, stages, classes, colours) for place in range(len(stages))]
    return tag(
        "article",
        tag("h4", example.image_id, tag("span", GROUPS[example.group][1], class_=f"mark {example.group}")),
        tag("p", f"mean IoU of this image, {stages[0].title} to {stages[-1].title}: {scores}", class_="score"),
        tag("div", *columns, class_="grid", style=f"--columns:{len(columns)}"),
        class_=example.group,
    )


def _truth_column(example: Example, classes: Sequence[str], colours: Sequence[Colour]) -> Html:
    truth = pictures.class_map(example.mask, colours)
    return tag(
        "div",
        _picture(pictures.photo(example.image), f"Image {example.image_id}", "image", "image"),
        _picture(truth, f"Truth: {_shares(example.mask, classes)}", "truth", "image"),
        class_="column",
    )


def _stage_column(
    example: Example, place: int, stages: Sequence[Stage], classes: Sequence[str], colours: Sequence[Colour]
) -> Html:
    stage, class_ids, confidence = stages[place], example.class_ids[place], example.confidence[place]
    before = example.class_ids[max(0, place - 1)]
    found = pictures.changes(example.mask, before, class_ids)
    sure = f"mean confidence {confidence.mean() / 255:.3f}"
    changed = _changed(found, place == 0)
    against = "right or wrong" if place == 0 else f"change from {stages[place - 1].title}"
    return tag(
        "div",
        _picture(
            pictures.class_map(class_ids, colours),
            f"Prediction of {stage.title}: {_shares(class_ids, classes)}",
            f"{stage.title}: prediction",
            "prediction",
        ),
        _picture(pictures.confidence_map(confidence), f"Confidence of {stage.title}: {sure}", sure, "confidence"),
        _picture(pictures.change_map(found), f"{stage.title}, {against}: {changed}", changed, "changes"),
        class_="column",
    )


def _picture(source: str, alternative: str, caption: str, kind: str) -> Html:
    image = tag("img", src=source, alt=alternative, loading="lazy", decoding="async")
    return tag("figure", image, tag("figcaption", caption), class_=f"picture {kind}")


def _shares(mask: np.ndarray, classes: Sequence[str]) -> str:
    """Which classes a mask shows, in words, the most frequent first."""
    counts = np.bincount(mask.ravel(), minlength=len(classes))[: len(classes)]
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return ", ".join(f"{classes[i]} {counts[i] / mask.size:.0%}" for i in order) or "every pixel ignored"


def _changed(found: np.ndarray, first: bool) -> str:
    counts = np.bincount(found.ravel(), minlength=pictures.STRIPE)
    counted = max(1, int(counts[: pictures.IGNORED].sum()))
    if first:
        return f"{counts[pictures.STILL_RIGHT] / counted:.1%} right"
    return f"{counts[pictures.BECAME_RIGHT] / counted:.1%} became right, {counts[pictures.BECAME_WRONG] / counted:.1%} wrong"
