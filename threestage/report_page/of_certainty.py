"""The page's part on uncertainty: whether it falls from stage to stage, and whether that is deserved."""

import math
from collections.abc import Sequence
from itertools import pairwise

from threestage.report_page import charts
from threestage.report_page.figures import Run, Stage
from threestage.report_page.markup import Html, disclosure, figure, joined, note, section, table, tag
from threestage.report_page.of_run import signed
from threestage.report_page.validation import Measured


def uncertainty(run: Run, found: Sequence[Measured], measured: str) -> Html:
    """Whether confidence rises from stage to stage, and whether it is deserved."""
    top = charts.rounded_up(max(float((m.counts[:, 0] / m.pixels).max()) for m in found))
    pairs = list(zip(run.stages, found, strict=True))
    histograms = [
        charts.histogram(
            f"Confidence of {stage.title}: mean {m.mean_confidence:.3f}", m.counts, m.mean_confidence, stage.number, top
        )
        for stage, m in pairs
    ]
    diagrams = [
        charts.reliability(f"Reliability of {stage.title}: ECE {m.calibration_error:.3f}", m.counts, stage.number)
        for stage, m in pairs
    ]
    return section(
        "uncertainty",
        "Does the uncertainty fall?",
        tag("p", _verdict(found), class_="verdict"),
        note(f"{measured} Ignored pixels do not count."),
        table(
            "Certainty of every stage on validation images",
            ["", "mean confidence", "mean entropy (nats)", "right pixels", "confidence − right", "ECE"],
            [_certainty_row(stage, m) for stage, m in pairs],
        ),
        figure(
            "Each bar is the share of pixels that got this confidence (the probability of the predicted class); the dashed line "
            "is the mean. The more the bars lean to the right from stage to stage, the surer the model.",
            _panels([f"{s.title}: mean confidence {m.mean_confidence:.3f}" for s, m in pairs], histograms),
        ),
        figure(
            "Among the pixels of one confidence, the bar is the share that is right. On the dashed diagonal the two agree. Bars "
            "below it: the model is surer than it should be; above it: it could be surer. ECE, the expected calibration "
            f"error, is the mean distance from the diagonal over all pixels ({len(found[0].counts)} bins); 0 is perfect. "
            "Few pixels stand behind the bars where the histogram above is low.",
            _panels([f"{s.title}: ECE {m.calibration_error:.3f}" for s, m in pairs], diagrams),
        ),
        disclosure("Figures of the reliability diagrams", *(_bins_table(stage, m) for stage, m in pairs)),
    )


def _verdict(found: Sequence[Measured]) -> str:
    entropies, errors = [m.mean_entropy for m in found], [m.calibration_error for m in found]
    listed = " → ".join(f"{value:.3f}" for value in entropies)
    if len(found) == 1:
        return f"Mean entropy on validation images: {listed} nats. There is no other stage to compare with."
    falls = [after < before for before, after in pairwise(entropies)]
    said = "falls with every stage" if all(falls) else "falls with some stages only" if any(falls) else "does not fall"
    text = f"Mean entropy on validation images: {listed} nats. The uncertainty {said}."
    return f"{text} {_deserved(errors)}"


def _deserved(errors: Sequence[float]) -> str:
    listed = " → ".join(f"{value:.3f}" for value in errors)
    better = errors[-1] <= errors[0]
    meaning = "certainty and correctness came closer together" if better else "certainty grew faster than correctness"
    return f"Calibration error: {listed}; from the first to the last stage, {meaning}."


def _certainty_row(stage: Stage, m: Measured) -> list[object]:
    gap = m.mean_confidence - m.accuracy
    return [stage.title, f"{m.mean_confidence:.3f}", f"{m.mean_entropy:.3f}", f"{m.accuracy:.3f}", signed(gap),
            f"{m.calibration_error:.3f}"]  # fmt: skip


def _panels(titles: Sequence[str], drawn: Sequence[Html]) -> Html:
    panels = [tag("div", tag("h3", title), plot) for title, plot in zip(titles, drawn, strict=True)]
    return tag("div", joined(panels), class_="panels")


def _bins_table(stage: Stage, m: Measured) -> Html:
    width = 1 / len(m.counts)
    rows = [
        [
            f"{i * width:.2f} to {(i + 1) * width:.2f}",
            f"{pixels:.0f}",
            _ratio(confidence, pixels),
            _ratio(correct, pixels),
        ]
        for i, (pixels, confidence, correct) in enumerate(m.counts.tolist())
    ]
    return table(f"Reliability of {stage.title}", ["confidence", "pixels", "mean confidence", "right"], rows)


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f}" if whole and not math.isnan(part) else "–"
