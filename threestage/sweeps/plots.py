"""Optuna's plots of a sweep as PNG files: which settings the trials had, and which of them matter."""

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from threestage.data import storage

if TYPE_CHECKING:
    from optuna.study import Study

LEAST_FOR_IMPORTANCES = 4
AXIS = "mean IoU on validation"
PARALLEL, THRESHOLDS, IMPORTANCES = "parallel_coordinates.png", "thresholds.png", "importances.png"
WIDTH_IN, HEIGHT_IN, DPI = 10.0, 6.0, 120
SLICE_IN, PARALLEL_IN = 2.5, 1.3  # least width per key
LONG = 14  # letters of a name that are one line of a label


def write_plots(study: "Study", keys: Sequence[str], uri_folder: str) -> list[str]:
    """Optuna's plots of the finished trials as PNG files in a folder; returns their names.

    thresholds.png shows the keys whose name contains "threshold", or all where none does. importances.png is made of
    four finished trials with differing values at least; without any finished trial there are no plots.
    """
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    present = sorted(key for key in keys if any(key in trial.params for trial in finished))
    if not present:
        return []
    drawn = {PARALLEL: present, THRESHOLDS: [key for key in present if "threshold" in key] or present}
    if weighed := weighed_keys([(trial.params, trial.value or 0.0) for trial in finished], present):
        drawn[IMPORTANCES] = weighed
    for name, shown in drawn.items():
        storage.write_bytes(storage.join(uri_folder, name), _png(study, name, shown, len(finished)))
    return list(drawn)


def weighed_keys(finished: Sequence[tuple[Mapping[str, Any], float]], keys: Sequence[str]) -> list[str]:
    """The keys that every finished trial (params, mean IoU) has and that differ; none where the trials cannot tell which
    matter."""
    if len(finished) < LEAST_FOR_IMPORTANCES or len({score for _, score in finished}) == 1:
        return []
    first = finished[0][0]
    there = [key for key in keys if all(key in params for params, _ in finished)]
    return [key for key in there if any(params[key] != first[key] for params, _ in finished)]


def _png(study: "Study", name: str, keys: list[str], finished: int) -> bytes:
    stream = io.BytesIO()
    with _quiet_pyplot():
        from matplotlib.axes import Axes

        drawn = _draw(study, name, keys)
        figure: Any = (drawn if isinstance(drawn, Axes) else drawn[0]).figure
        narrow = SLICE_IN if name == THRESHOLDS else PARALLEL_IN if name == PARALLEL else 0.0
        figure.set_size_inches(max(WIDTH_IN, narrow * len(keys)), HEIGHT_IN)
        _TIDY[name](figure, keys)
        figure.suptitle(f"{finished} finished trial{'s' if finished > 1 else ''}", y=0.96)
        figure.savefig(stream, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    return stream.getvalue()


def _draw(study: "Study", name: str, keys: list[str]) -> Any:
    """fANOVA weighs the settings: of 8 to 20 trials it finds the one that matters more often than Optuna's default does."""
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    if name == PARALLEL:
        return plots.plot_parallel_coordinate(study, keys, target_name=AXIS)
    if name == THRESHOLDS:
        return plots.plot_slice(study, keys, target_name=AXIS)
    return plots.plot_param_importances(study, FanovaImportanceEvaluator(seed=0), keys, target_name=AXIS)


def _tidy_parallel(figure: Any, keys: Sequence[str]) -> None:
    """Whole names, which Optuna cuts at 20 letters; lines that are seen on white, and figures that are read on lines."""
    first = figure.axes[0]
    first.set_title("")
    first.set_xticks(range(len(keys) + 1), ["mean IoU on\nvalidation", *map(_lines, keys)], rotation=0, fontsize=9)
    for lines in first.collections:
        lines.set(cmap="viridis_r", linewidth=1.5)
    for axes in figure.axes:
        _unquote(axes.yaxis)
        for label in axes.get_yticklabels(which="both"):
            label.set(fontsize=9, bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5})


def _tidy_slices(figure: Any, keys: Sequence[str]) -> None:
    if len(keys) == 1:
        figure.axes[0].set_title("")
    for axes, key in zip(figure.axes, keys, strict=False):
        axes.set_xlabel(_lines(key), fontsize=10)
        _unquote(axes.xaxis)
        if axes.get_xscale() == "log":
            low, high = axes.get_xlim()
            ticks = [low, math.sqrt(low * high), high]
            axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        for label in axes.get_xticklabels() if len(keys) > 2 else ():
            label.set(rotation=30, ha="right", rotation_mode="anchor", fontsize=9)
    figure.axes[-1].set_ylabel("trial")


def _tidy_importances(figure: Any, keys: Sequence[str]) -> None:
    axes = figure.axes[0]
    axes.set_title("", loc="left")
    axes.set(
        xlabel=f"share of the differences in {AXIS}\n(settings that differ and that every finished trial has)",
        ylabel="",
    )
    axes.get_legend().remove()


_TIDY = {PARALLEL: _tidy_parallel, THRESHOLDS: _tidy_slices, IMPORTANCES: _tidy_importances}


def _unquote(axis: Any) -> None:
    """Choices are JSON texts in the study; show them without quotes."""
    texts = [label.get_text() for label in axis.get_ticklabels()]
    if any('"' in text or "'" in text for text in texts):
        axis.set_ticks(axis.get_ticklocs(), [text.strip("'\"") for text in texts])


def _lines(key: str) -> str:
    """A dotted key in lines of a section each; the last one is broken in two where it is long."""
    *sections, leaf = key.split(".")
    if len(leaf) > LONG:
        middle = min(
            (i for i, letter in enumerate(leaf) if letter == "_"), key=lambda i: abs(i - len(leaf) / 2), default=0
        )
        leaf = f"{leaf[: middle + 1]}\n{leaf[middle + 1 :]}" if middle else leaf
    return ".\n".join([*sections, leaf])


@contextlib.contextmanager
def _quiet_pyplot() -> Iterator[None]:
    """Optuna draws with pyplot: without a window or a word, and pyplot is left as it was."""
    import matplotlib
    import optuna
    from matplotlib import pyplot

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend, open_before, verbosity = pyplot.get_backend(), pyplot.get_fignums(), optuna.logging.get_verbosity()
        pyplot.switch_backend("Agg")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            yield
        finally:
            for number in set(pyplot.get_fignums()) - set(open_before):
                pyplot.close(number)
            optuna.logging.set_verbosity(verbosity)
            pyplot.switch_backend(backend)
