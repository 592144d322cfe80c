"""`threestage suspects`: labelled images whose masks are contradicted by models that have not learnt them, the worst first.

OUT/suspects.json          what was asked for, and the images with their figures
OUT/suspects.csv           the same images, one a line
OUT/images.txt             their ids, one a line, as `labels export --images` takes them
OUT/suspects.html          their pictures
OUT/folds/fold1/ …         a run each: stage 1 without the labels of the fold; what is done is kept, so the same command continues
OUT/predictions/           what these runs say of the images of their fold, and of a part of the validation images
OUT/coco/ …                the export, by the name of its format
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from threestage.data import storage
from threestage.data.outputs import EXPORT_MARK, SUSPECTS, SUSPECTS_MARK, claim
from threestage.data.records import Manifest
from threestage.data.split import groups_of
from threestage.errors import InputError, Warn
from threestage.labels.label_export import ExportSettings, check_format, export_masks
from threestage.labels.predicted_masks import PredictedMask, PredictedMasks
from threestage.prediction.champion import named
from threestage.prediction.predict import enlarged
from threestage.run.run import side_run
from threestage.run_folder.folder import RunFolder
from threestage.selection.contradictions import (
    Contradiction,
    contradiction_of,
    most_contradicted,
    usual_surprise,
)
from threestage.selection.folds import folds_of
from threestage.selection.held_out import HeldOutTask, predict_held_out, read_held_out
from threestage.selection.image_lists import LIST_NAME, Progress, begin_list, write_lists
from threestage.selection.supervised import Examined, examined_run, watched
from threestage.selection.suspects_page import write_suspects_page
from threestage.settings import Settings


class SuspectsSettings(Settings):
    """`folds`: models that are trained, each without the labels of its fold; `steps`: of each, None: those of the run's stage 1;
    `count`: how many images; `export`: a labelling tool's format."""

    folds: int = Field(4, ge=2)
    steps: int | None = Field(None, ge=1)
    count: int = Field(20, ge=1)
    export: str | None = None


class Suspect(Settings):
    """A labelled image. `score`: see contradictions.py, 0 is usual; `contradicted`: share of its labelled pixels; `labelled` and
    `predicted`: the classes of the commonest contradiction."""

    image_id: str
    source: str
    score: float
    contradicted: float
    labelled: str
    predicted: str
    why: str


class SuspectsReport(Settings):
    """`examined`: labelled images, of which `images` are the most suspect. `export`: folder of the export."""

    out: str
    run: str
    examined: int
    images: tuple[Suspect, ...]
    export: str | None = None


def suspects(
    run: str,
    out: str,
    settings: SuspectsSettings,
    local: bool = True,
    address: str | None = None,
    progress: Progress = lambda what, done, total: None,
    warn: Warn = print,
) -> SuspectsReport:
    """Rank the labelled images of a run and write the most suspect ones into the folder `out`.

    The models are trained in this process (`local`), or on Ray, on the cluster at `address`. Raises InputError where the run has
    not begun or has too few labels, where `out` holds something else or another list, and as `threestage run` does.
    """
    run, out = storage.absolute(run), storage.absolute(out)
    if settings.export is not None:
        check_format(settings.export, "--export")
    examined = examined_run(run, address, settings.steps)
    folds = folds_of_run(examined, settings.folds)
    record = {"run": run, **settings.model_dump(mode="json", exclude={"export"})}
    claim(out, SUSPECTS)
    done = begin_list(out, SUSPECTS_MARK, record)
    parts = [_Part(number, len(folds), fold, out) for number, fold in enumerate(folds, 1)]
    if "images" not in done:  # else somebody may be correcting them
        for part in parts:
            part.predict(examined, local, progress, warn)
        done = record | _ranked(examined.manifest, [part.uri for part in parts], settings.count)
        write_lists(out, SUSPECTS_MARK, tuple(Suspect.model_fields), done)
    images = tuple(Suspect.model_validate(image) for image in done["images"])
    uris = [part.uri for part in parts]
    write_suspects_page(out, done, uris, examined.manifest, examined.config.data)
    report = SuspectsReport(out=out, run=run, examined=done["examined"], images=images)
    return report if settings.export is None else _export(report, settings.export, examined, uris)


def folds_of_run(examined: Examined, count: int) -> list[tuple[str, ...]]:
    """What each model is asked about: the labels that it does not learn, and a part of the validation images. Raises InputError
    where there are fewer labels than folds."""
    labelled, validation = examined.split.labelled, examined.split.validation
    folds = folds_of(labelled, groups_of(examined.config.data, labelled), count)
    if not all(folds):
        raise InputError(
            f"--folds {count}: {examined.run} has {len(labelled)} labels, too few or in too few groups; give fewer folds",
            "next/too-few-for-folds",
        )
    return [(*fold, *validation[number::count]) for number, fold in enumerate(folds)]


@dataclass(frozen=True)
class _Part:
    """Images that one model is asked about."""

    number: int
    of: int
    ids: tuple[str, ...]
    out: str

    @property
    def uri(self) -> str:
        return storage.join(self.out, "predictions", f"fold{self.number}.parquet")

    def predict(self, examined: Examined, local: bool, progress: Progress, warn: Warn) -> None:
        """Train the model and ask it, as far as that is not done."""
        held_out = frozenset(self.ids)
        labelled = [image_id for image_id in examined.split.labelled if image_id not in held_out]
        folder = RunFolder(storage.join(self.out, "folds", f"fold{self.number}"))
        on = watched(f"model {self.number} of {self.of}: step", examined.config.stage1.steps, progress, warn)
        side_run(examined.config, folder.out, examined.split_of(labelled), local, on)
        predict_held_out(
            HeldOutTask(
                model=storage.join(folder.part("stage1"), "model"),
                model_digest=folder.result("stage1")["model_digest"],
                root=examined.config.data.root,
                version=examined.manifest.version,
                ids=self.ids,
                uri=self.uri,
            )
        )


# ---- The list


def _ranked(manifest: Manifest, uris: Sequence[str], count: int) -> dict[str, Any]:
    """The images, as plain JSON, and how many were examined."""
    usual = usual_surprise(read_held_out(uris), len(manifest.classes))
    found = most_contradicted(contradiction_of(image, usual) for image in read_held_out(uris))
    images = [_described(one, manifest.classes) for one in found[:count]]
    return {"examined": len(found), "images": [image.model_dump(mode="json") for image in images]}


def _described(found: Contradiction, classes: Sequence[str]) -> Suspect:
    labelled, predicted, why = "", "", "nothing is contradicted confidently"
    if found.labelled is not None and found.predicted is not None:
        labelled, predicted = classes[found.labelled], classes[found.predicted]
        why = (
            f"{found.share:.0%} of its pixels are contradicted; {found.pair_share:.0%} are labelled {labelled} and "
            f"predicted {predicted}"
        )
    return Suspect(
        image_id=found.image_id,
        source=found.source,
        score=round(found.score, 4),
        contradicted=round(found.share, 4),
        labelled=labelled,
        predicted=predicted,
        why=why,
    )


# ---- For the labelling tool


def _export(report: SuspectsReport, to: str, examined: Examined, uris: Sequence[str]) -> SuspectsReport:
    """The report with the folder of the export: the masks of the models; one that is finished stays as it is."""
    folder = storage.join(report.out, to)
    mark = storage.join(folder, EXPORT_MARK)
    if not (storage.exists(mark) and storage.read_json(mark, dict[str, Any]).get("finished")):
        manifest, wanted = examined.manifest, frozenset(image.image_id for image in report.images)
        masks = _masks(uris, wanted, examined.config.data.downscale)
        found = PredictedMasks(report.out, list(zip(manifest.classes, manifest.colours, strict=True)), masks)
        export_masks(found, folder, ExportSettings(to=to, images=storage.join(report.out, LIST_NAME)))
    return report.model_copy(update={"export": folder})


def _masks(uris: Sequence[str], wanted: frozenset[str], downscale: int) -> Iterator[PredictedMask]:
    for image in read_held_out(uris, wanted):
        class_ids = enlarged(image.class_ids, downscale, image.size)
        yield PredictedMask(image.image_id, named(image.image_id, image.source), class_ids, None)
