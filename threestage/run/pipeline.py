"""Stage 1 → pseudo-masks 1 → stage 2 → pseudo-masks 2 → stage 3: what is done is skipped, what is half done continues.

The pipeline knows only the order. A backend (backend.py) trains the stages and predicts the pool, in this process or on Ray;
everything lies in one folder (run_folder/folder.py).
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import threestage
from threestage.config import Config, StageName
from threestage.data import storage
from threestage.data.outages import tries
from threestage.data.pool import PoolFile, rows_of
from threestage.data.rejects import RejectList
from threestage.data.storage_errors import refuse_unwritable
from threestage.errors import InputError, StageFailure
from threestage.models.export import HALFWAY_MODEL
from threestage.prediction.pseudo_masks import (
    FileReport,
    PoolTask,
    Statistics,
    check_collapse,
    gather,
    set_digest,
    vanished_classes,
    vanished_text,
)
from threestage.run import continuation
from threestage.run.backend import Backend, RunCallbacks
from threestage.run.context import RunContext
from threestage.run.outcome import figures_of, lineage_of, outcome_of
from threestage.run.pool_files import find_in_background
from threestage.run.stages import StageTask
from threestage.run_folder.folder import RunFolder
from threestage.run_folder.lineage import PseudoMaskSet
from threestage.run_folder.reuse import REUSED
from threestage.verdict import EARLIER_VERSION, NO_CONTROL, judge


def run(
    config: Config,
    out: str,
    backend: Backend,
    on: RunCallbacks,
    reuse: str | None = None,
    continue_from: str | None = None,
) -> dict[str, Any]:
    """Run the stages that are not done yet; returns what results.json holds.

    `reuse` is the folder of another run: its split serves this one too, its stages as far as they would be computed the
    same, and with their pseudo-masks its pool. It must stay where it is and is never changed. `continue_from`: a run whose
    champion stage 1 starts from, and whose validation images are kept.

    Where a store is away it waits, and then continues from what is done. Raises InputError before any training when the input is
    wrong, or when `out` holds a run with other inputs; UnwritablePlace when `out` takes no writes any more.
    """
    for attempt in tries("the run", on.on_warning):
        with attempt, refuse_unwritable(storage.absolute(out)):
            stages_of = _Stages.prepare(config, out, backend, on, reuse, continue_from)
            stages: dict[StageName, dict[str, Any]] = {}
            previous: dict[str, Any] | None = None
            pseudo_masks: PseudoMaskSet | None = None
            for number, stage in enumerate(config.stage_names, 1):
                learnt_from = pseudo_masks
                done = stages_of.train(stage, number, None if learnt_from is None else learnt_from.digest)
                if previous is not None:
                    stages_of.check_progress(stage, done["mean_iou"], previous["mean_iou"])
                pseudo_masks = stages_of.predict(stage, number, done["model_digest"])
                stages[stage] = stages_of.report(stage, done, previous, learnt_from, pseudo_masks)
                previous = done
            results = _results(stages_of.context, stages_of.folder, stages, rows_of(stages_of.pool()))
            storage.write_json(storage.join(stages_of.folder.out, "results.json"), results)
    return results


@dataclass(frozen=True)
class _Stages:
    """The stages of one run. `label_pixels`: of each class; `pool`: waits for the pool's files."""

    context: RunContext
    folder: RunFolder
    label_pixels: list[int]
    pool: Callable[[], list[PoolFile]]
    backend: Backend
    on: RunCallbacks

    @classmethod
    def prepare(
        cls, config: Config, out: str, backend: Backend, on: RunCallbacks, reuse: str | None, continue_from: str | None
    ) -> "_Stages":
        """Read, check and write down what the run works with."""
        folder = RunFolder.at(out, reuse)
        context = RunContext.resolve(config, folder, continuation.read_or_begin(folder, config, continue_from, reuse))
        label_pixels = context.check(on.on_warning)
        folder = folder.with_reuse(context.config, reuse, context.digests)
        context = context.written_into(folder, backend.predict_pool)
        kept = context.split.labelled
        pool = find_in_background(context.config, folder, context.manifest, backend.map, on.on_warning, kept)
        return cls(context, folder, label_pixels, pool, backend, on)

    @property
    def config(self) -> Config:
        return self.context.config

    def train(self, stage: StageName, number: int, pseudo_digest: str | None) -> dict[str, Any]:
        """Train a stage unless its marker says that it is done; returns its result."""
        inputs = {
            "code_version": threestage.__version__,
            "pseudo_masks": pseudo_digest,
            **self.context.digests,
            "keys": self.context.keys(stage),
        }
        done = self.folder.is_done(stage)
        self.folder.verify_or_record_inputs(stage, inputs, self.on.on_warning)
        if not done:
            if not self.folder.has_started(stage):
                self.folder.delete_rejects(stage)
            self.backend.train_stage(self._task(stage, number))
            self._refuse_too_many(stage)
            _warn_of_thresholds(self.config, stage, self.folder.result(stage)["history"], self.on.on_warning)
            self.folder.mark_stage(stage, inputs, self.context.data_set())
        return self.folder.finished(stage)

    def _task(self, stage: StageName, number: int) -> StageTask:
        sees_pool = self.config.stage(stage).unlabelled_batch > 0
        if sees_pool:
            self.pool()  # the list is written
        return StageTask(
            stage=stage,
            # without registry, whose URI may hold a password
            config=self.config.for_stage(stage).model_dump(mode="json", exclude={"registry"}),
            manifest_version=self.context.manifest.version,
            split=self.context.split,
            folder=self.folder.part(stage),
            pool=self.folder.part("pool.parquet") if sees_pool else None,
            pseudo_masks=None if number == 1 else self.folder.part(f"pseudo_masks{number - 1}"),
            previous_model=_previous_model(self.context, self.folder, number),
            bands=self.context.bands,
        )

    def _refuse_too_many(self, stage: StageName) -> None:
        """Raise StageFailure when more images than allowed could not be read while the stage trained."""
        rejects = self.folder.rejects(stage)
        if not rejects:
            return
        folder = self.folder.part(stage)
        listed = storage.join(folder, "rejects.parquet")
        found = RejectList(rejects)
        found.write_for_people(listed, folder)
        if complaint := found.complaint(rows_of(self.pool()), self.config.data.max_bad_fraction, listed):
            raise StageFailure(
                f"{stage}: {complaint}; raise data.max_bad_fraction to continue, or bring the images back and delete "
                f"{folder} to train it again",
                "data/bad-images",
            )
        self.on.on_warning(f"{stage}: {len(rejects)} images could no longer be read while it trained: {listed}")

    def check_progress(self, stage: StageName, score: float, before: float) -> None:
        """Warn, or stop, when a stage scores less than the one before (`pseudo_mask.on_collapse`)."""
        if score < before:
            text = f"{stage} scores {score:.3f} mean IoU, less than the {before:.3f} of the stage before"
            check_collapse(self.config.pseudo_mask.on_collapse, text, self.on.on_warning)

    def predict(self, stage: StageName, number: int, model_digest: str) -> PseudoMaskSet | None:
        """Predict the pool with a stage's model, unless that is done; after the last stage, for which no stage learns from it,
        only where `pseudo_mask.final_stage` asks for it."""
        if stage == self.config.stage_names[-1] and not self.config.pseudo_mask.final_stage:
            return None
        part, files = f"pseudo_masks{number}", self.pool()
        task = _pool_task(self.context, self.folder, stage, part, model_digest)
        digest, found = set_digest(task, files), self.folder.set_digest(part, self.config.stage_names)
        comparing = task.model_copy(update={"halfway_model": ""})  # made for a run that compares, they serve any
        as_before = task.model_copy(update={"precision": "auto"})  # an older threestage predicted every pool so
        others = (set_digest(other, files) for other in (comparing, as_before))
        digest = next((other for other in others if other == found), digest)
        if found != digest:
            if part in self.folder.reused_parts:
                raise InputError(
                    f"{task.destination}, which {storage.join(self.folder.out, REUSED)} names, is gone or of other settings "
                    "(data.max_image_pixels): give another --out",
                    "run/reused-gone",
                )
            self.folder.refuse_new_targets(f"stage{number + 1}", digest)
            reports = self.backend.predict_pool(storage.join(self.folder.part(stage), "model"), task, files)
            images = rows_of(files) - self.context.split.carved
            watched = _counted(reports, f"pseudo-masks {number}", images, self.on.on_progress)
            statistics = gather(task, files, watched, self.config.data.max_bad_fraction)
            self._check_set(stage, part, statistics)
            marker = {"digest": digest, "statistics": statistics.model_dump(mode="json")}
            storage.write_json(storage.join(task.destination, "done.json"), marker)
        statistics = self.folder.set_marker(part)["statistics"]
        return PseudoMaskSet(
            uri=task.destination,
            digest=digest,
            images=statistics.images,
            rejected=statistics.unreadable,
            statistics=statistics.summary(),
        )

    def report(
        self,
        stage: StageName,
        done: Mapping[str, Any],
        previous: Mapping[str, Any] | None,
        learnt_from: PseudoMaskSet | None,
        made: PseudoMaskSet | None,
    ) -> dict[str, Any]:
        """Pass a finished stage to the callbacks; returns its figures. The arguments are those of `lineage_of`."""
        figures = figures_of(done, made, len(self.folder.rejects(stage)))
        lineage = lineage_of(self.context, self.folder, stage, done, previous, learnt_from, made)
        summary = {key: value for key, value in figures.items() if key != "per_class_iou"}
        self.on.on_stage_done(outcome_of(self.context, self.folder, summary, done, lineage))
        return figures

    def _check_set(self, stage: StageName, part: str, statistics: Statistics) -> None:
        """Warn of images that were left out; warn, or stop, when a class has vanished from the pseudo-masks."""
        if statistics.unreadable:
            listed = storage.join(self.folder.part(part), "rejects.parquet")
            self.on.on_warning(
                f"{statistics.unreadable} images of the pool could not be used and are left out: {listed}"
            )
        vanished = vanished_classes(statistics, self.label_pixels, self.context.manifest.classes)
        if vanished:
            text = vanished_text(vanished, self.label_pixels, self.context.manifest.classes)
            check_collapse(self.config.pseudo_mask.on_collapse, f"{stage}: {text}", self.on.on_warning)


def _pool_task(context: RunContext, folder: RunFolder, stage: StageName, part: str, model_digest: str) -> PoolTask:
    """With the weights by which the next stage chooses its images, if it does."""
    config = context.config
    task = PoolTask(
        destination=folder.part(part),
        model_digest=model_digest,
        num_classes=len(context.manifest.classes),
        downscale=config.data.downscale,
        max_image_pixels=config.data.max_image_pixels,
        batch_size=config.pseudo_mask.batch_size,
        used_ids=frozenset(context.split.labelled),
        excluded_ids=frozenset(context.split.validation),
        fixed_void=context.static_void,
        precision=config.for_stage(stage).training.precision,
        inference=config.inference,
        bands=context.bands,
    )
    chooser = config.choosing_after(stage)
    if chooser is None:
        return task
    halfway = storage.join(folder.part(stage), HALFWAY_MODEL)
    if not storage.exists(storage.join(halfway, "model.json")):
        raise InputError(
            f"{chooser}.reliable_share={config.stage(chooser).reliable_share}: {halfway} is missing, an "
            f"older threestage trained {stage}; set it to 1, or delete {folder.part(stage)} and what "
            "follows it",
            "run/no-halfway-weights",
        )
    return task.model_copy(update={"halfway_model": halfway})


def _counted(
    reports: Generator[FileReport], what: str, total: int, on_progress: Callable[[str, int, int], None]
) -> Iterator[FileReport]:
    """The reports of predicted files, each shown as so many of `total` images."""
    done = 0
    with contextlib.closing(reports):
        for report in reports:
            done += report.statistics.images + report.statistics.unreadable
            on_progress(what, done, total)
            yield report


def _warn_of_thresholds(
    config: Config, stage: StageName, history: Sequence[Mapping[str, float | None]], warn: Callable[[str], None]
) -> None:
    """A term whose threshold kept no pixel in any row has taught the stage nothing."""
    settings = config.for_stage(stage)
    for section, threshold in (
        ("consistency", settings.consistency.confidence_threshold),
        ("pseudo_mask", settings.pseudo_mask.confidence_threshold),
    ):
        kept = [row[name] for row in history if (name := f"kept_share/{section}") in row]
        if threshold > 0 and kept and not any(kept):
            key = f"{section}.confidence_threshold={threshold:g}"
            warn(f"{stage}: {key} kept no pixel in the whole stage, so its loss taught nothing: lower it")


def _previous_model(context: RunContext, folder: RunFolder, number: int) -> str | None:
    """What a stage may start from: the model of the stage before, or of the run that this one continues."""
    if number > 1:
        return storage.join(folder.part(f"stage{number - 1}"), "model")
    return None if context.continued is None else context.continued.champion.model


def _results(
    context: RunContext, folder: RunFolder, stages: Mapping[StageName, Mapping[str, Any]], pool_images: int
) -> dict[str, Any]:
    """What results.json holds."""
    config, manifest, split = context.config, context.manifest, context.split
    results = {
        "name": config.name,
        "seed": config.seed,
        "data": {"root": config.data.root, "version": manifest.version, "digest": manifest.digest,
                 "labelled": len(split.labelled), "validation": len(split.validation), "pool": pool_images},
        "stages": stages,
        **_verdict(context, folder, stages),
        "reused": dict(folder.reused_parts),
    }  # fmt: skip
    if context.continued is None:
        return results
    champion = results["verdict"]["choice"] if results["verdict"] else list(stages)[-1]
    return results | context.continued.results(continuation.round_of(folder.out, champion, results))


def _verdict(context: RunContext, folder: RunFolder, stages: Mapping[StageName, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether the unlabelled images paid, as plain JSON: `verdict`, or why there is none, if any stage learnt from them."""
    if context.config.stage1.unlabelled_batch > 0:
        return {"verdict": None, "no_verdict": NO_CONTROL}
    if len(stages) < 2:
        return {"verdict": None}
    first, *_, last = map(folder.part, stages)
    strong_view, groups = context.config.stage1.strong_view, context.split.groups
    verdict = judge(first, last, stages, context.config.seed, strong_view, groups)
    if verdict is None:
        return {"verdict": None, "no_verdict": EARLIER_VERSION}
    return {"verdict": verdict.model_dump(mode="json")}
