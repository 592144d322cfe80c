"""The page's parts on the unlabelled pool: what was predicted for it, and what of it could not be used."""

from collections.abc import Sequence

from threestage.report_page import charts
from threestage.report_page.charts import Bars
from threestage.report_page.figures import Run, Stage
from threestage.report_page.markup import Html, disclosure, figure, note, section, table, tag
from threestage.report_page.of_run import number, share

LABELS_STYLE = 4


def pseudo_masks(run: Run, label_pixels: Sequence[int] | None) -> Html:
    with_masks = [stage for stage in run.stages if stage.statistics is not None]
    if not with_masks:
        return section("pseudo-masks", "Pseudo-masks", note("No stage has predicted the pool yet."))
    summaries = [stage.statistics.summary() for stage in with_masks if stage.statistics]
    above = [name for name in summaries[0] if name.startswith("share_above_")]
    header = [
        "",
        "images",
        "mean confidence",
        "mean entropy (nats)",
        *(f"above {n.rsplit('_', 1)[1]}" for n in above),
        "mean IoU",
    ]
    rows: list[list[object]] = []
    for stage, values in zip(with_masks, summaries, strict=True):
        assert stage.statistics is not None
        certain = [
            number(values["mean_confidence"]),
            number(values["mean_entropy"]),
            *(share(values[n]) for n in above),
        ]
        rows.append([stage.title, stage.statistics.images, *certain, number(values.get("pseudo_mask_mean_iou"))])
    return section(
        "pseudo-masks",
        "Pseudo-masks of the pool",
        note(
            "What each stage predicts for the unlabelled pool; the next stage learns from it. “Above” is the share of pixels "
            "with more than that confidence. The mean IoU is of pool images whose masks are known and were not trained on; a "
            "dash where there are none."
        ),
        table("Certainty and quality of the pseudo-masks", header, rows),
        tag("h3", "Balance of the classes"),
        _balance(with_masks, label_pixels),
    )


def _balance(stages: Sequence[Stage], label_pixels: Sequence[int] | None) -> Html:
    names = list(stages[0].result["per_class_iou"])
    found = [] if not label_pixels or not sum(label_pixels) else [Bars("labels", LABELS_STYLE, _shares(label_pixels))]
    found += [Bars(s.title, s.number, _shares(s.statistics.class_pixels)) for s in stages if s.statistics]
    rows = [[name, *(share(one.values[place]) for one in found)] for place, name in enumerate(names)]
    drawn = figure(
        "Which share of the pixels each class has, in the labels that the run may see and in the pseudo-masks. The pool need not "
        "be balanced like the labels; but a class whose bar dwindles from stage to stage is being forgotten.",
        charts.bars("Share of every class in the labels and in the pseudo-masks", names, found, share),
        key=charts.key([(one.name, one.style) for one in found], "bar"),
    )
    header = ["class", *(one.name for one in found)]
    absent = [] if len(found) > len(stages) else [note("The labels' shares are missing: the data set was not at hand.")]
    return tag("div", *absent, drawn, disclosure("The same as a table", table("Shares of the pixels", header, rows)))


def _shares(pixels: Sequence[int]) -> list[float | None]:
    return [count / max(1, sum(pixels)) for count in pixels]


def rejected(run: Run) -> Html:
    if not run.rejected:
        return section("rejected", "Rejected inputs", note("No image of the pool was refused."))
    where: dict[tuple[str, str], list[str]] = {}
    for place in run.rejected:
        for entry in place.first:
            where.setdefault(entry, []).append(place.where)
    counts = [[place.where, place.count] for place in run.rejected]
    rows = [[source, reason, ", ".join(places)] for (source, reason), places in where.items()]
    return section(
        "rejected",
        "Rejected inputs",
        note(
            "Images of the pool that could not be used: the run left them out and went on. All are in the rejects.parquet there."
        ),
        table("How many images were left out", ["where", "images"], counts),
        table("The first of them", ["image", "reason", "where"], rows),
    )
