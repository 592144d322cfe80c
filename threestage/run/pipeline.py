"""Stage 1 → pseudo-masks 1 → stage 2 → pseudo-masks 2 → stage 3: what is done is skipped, what is half done goes on.

Three callables do the work (in this process, or on Ray, or with MLflow): the pipeline knows only their order.
Everything lies under one folder:

    split.json                    which images are labelled and which validate
    stage1/inputs.json            what the stage was started with: config keys and digests
    stage1/checkpoints …          the stage's own, while it trains
    stage1/model/                 model.safetensors, model.json: the weights of the last step
    stage1/best_model/            the same of the best evaluation, where that is an earlier step
    stage1/halfway_model/         of half of its steps; by these the next stage may choose its images (reliable_share)
    stage1/image_counts.parquet   pixels of each validation image that the last weights got right, of each class
    stage1/result.json            metrics and history
    stage1/done.json              the marker, written last
    listing/                      of data.unlabelled, where that is a prefix of image files (data/listing.py)
    pool.parquet                  the files of the pool; fixed once stage 2 has begun
    pseudo_masks1/*.parquet       one file per image file, rejects.parquet, index.parquet, then done.json
    reused.json                   which of these lie in the folder of another run (threestage/run_folder/reuse.py)
    results.json                  the table of all stages, and whether the unlabelled images paid (threestage/verdict.py)
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import threestage
from threestage.checks.preflight import check_pool, check_run
from threestage.config import Config, StageName, flatten, stage_keys
from threestage.data import storage
from threestage.data.batches import SampleSet
from threestage.data.datasets import labelled_set, static_void_mask, validation_set
from threestage.data.listing import Each, holds_data_set, in_threads, list_images
from threestage.data.pool import PoolFile, data_set_files, listed_pool, load_pool, pool_source, rows_of, write_pool
from threestage.data.records import Manifest, load_manifest
from threestage.data.rejects import Reject, RejectList, read_rejects
from threestage.data.split import Split, make_split, saved_split
from threestage.errors import InputError, StageFailure, reason_of
from threestage.models.export import HALFWAY_MODEL
from threestage.models.network import doubtful_normalisation
from threestage.prediction.pseudo_masks import (
    FileReport,
    PoolTask,
    SetMarker,
    Statistics,
    check_guard,
    gather,
    set_digest,
    vanished_classes,
)
from threestage.run.stages import StageTask
from threestage.run_folder.lineage import AT_SIZE, DataSet, Images, Lineage, PseudoMaskSet, Teacher
from threestage.run_folder.records import StageInputs, StageMarker, StageResult
from threestage.run_folder.reuse import REUSED, parts_elsewhere, resolve_part, shared_parts
from threestage.settings import Settings
from threestage.training.checkpoint import Checkpoints, checkpoint_folder
from threestage.verdict import EARLIER_VERSION, NO_CONTROL, judge

RunStage = Callable[[StageTask], None]
PredictPool = Callable[
    [str, PoolTask, Sequence[PoolFile]], Generator[FileReport]
]  # (model folder, task, files) → as done
Warn = Callable[[str], None]
Watch = Callable[[str, int, int], None]  # (what is done, so many, of so many)


class StageOutcome(Settings):
    """A finished stage, as it is recorded, as plain JSON: `model` is its folder, `summary` its figures. Its rows of metrics
    are in result.json."""

    stage: StageName
    model: str
    summary: dict[str, float]
    tags: dict[str, str]
    lineage: Lineage


Record = Callable[[StageOutcome], None]
LISTED_ROWS_PER_FILE = 512


def run(
    config: Config,
    out: str,
    run_stage: RunStage,
    predict_pool: PredictPool,
    record: Record,
    warn: Warn = print,
    each: Each = in_threads,
    watch: Watch = lambda what, done, total: None,
    reuse: str | None = None,
) -> dict[str, Any]:
    """Run the stages that are not done yet; returns what results.json holds. `each` runs the parts of a listing.

    `reuse` is the folder of another run: its split serves this one too, its stages as far as they would be computed the
    same, and with their pseudo-masks its pool. It must stay where it is and is never changed.

    Raises InputError before any training when the input is wrong, or when `out` holds a run with other inputs.
    """
    config, out = config.with_absolute_paths(), storage.absolute(out)
    manifest = load_manifest(config.data.root)
    elsewhere = parts_elsewhere(out)
    if reuse is not None and not elsewhere:
        elsewhere = {"split.json": storage.join(storage.absolute(reuse), "split.json")}
    split = _read_or_make_split(config, out, elsewhere.get("split.json"), manifest)
    root, downscale = config.data.root, config.data.downscale
    labelled = labelled_set(root, manifest, split, downscale, None)
    validation = validation_set(root, manifest, split, downscale)
    _refuse_missing(root, split, labelled, validation)
    label_pixels = check_run(config, manifest, labelled, validation, warn)
    if doubt := doubtful_normalisation(config.network):
        warn(doubt)
    void = None if config.data.fixed_void is None else static_void_mask(labelled, config.data.fixed_void)
    digests = {"labelled": labelled.digest(), "validation": validation.digest()}
    elsewhere = _reuse(config, out, reuse, digests)
    storage.write_json(storage.join(out, "split.json"), _split_record(config, split))
    pool = _pool_in_background(config, out, manifest, each, warn)
    run_ = _Run(
        config, out, elsewhere, manifest, split, label_pixels, void, digests, pool, run_stage, predict_pool, warn, watch
    )
    stages = _run_stages(run_, record)
    results = {
        "name": config.name,
        "seed": config.seed,
        "data": {"root": config.data.root, "version": manifest.version, "digest": manifest.digest,
                 "labelled": len(split.labelled), "validation": len(split.validation),
                 "pool": rows_of(pool())},
        "stages": stages,
        **run_.verdict(stages),
        "reused": elsewhere,
    }  # fmt: skip
    storage.write_json(storage.join(out, "results.json"), results)
    return results


def _reuse(config: Config, out: str, reuse: str | None, digests: dict[str, str]) -> dict[str, str]:
    """The parts of the run that lie elsewhere: decided once, then read."""
    elsewhere = parts_elsewhere(out)
    if reuse is None or elsewhere:
        return elsewhere
    if has_started(storage.join(out, "stage1")):
        raise InputError(
            f"--reuse {reuse}: {out} has a stage1 of its own; give another --out, or leave --reuse out",
            "run/reuse-too-late",
        )
    elsewhere = shared_parts(config, storage.absolute(reuse), digests)
    storage.write_json(storage.join(out, REUSED), elsewhere)
    return elsewhere


def _run_stages(run_: "_Run", record: "Record") -> dict[StageName, dict[str, Any]]:
    """Train and predict with every stage; returns their figures."""
    stages: dict[StageName, dict[str, Any]] = {}
    previous: dict[str, Any] | None = None
    pseudo_masks: PseudoMaskSet | None = None
    for number, stage in enumerate(run_.config.stage_names, 1):
        learnt_from = pseudo_masks
        done = run_.train(stage, number, None if learnt_from is None else learnt_from.digest)
        summary = {key: done[key] for key in ("mean_iou", "pixel_accuracy", "seconds", "steps")} | previous_scores(done)
        if previous is not None and done["mean_iou"] < previous["mean_iou"]:
            check_guard(run_.config.pseudo_mask.guard, f"{stage} scores {done['mean_iou']:.3f} mean IoU, less than the "
                        f"{previous['mean_iou']:.3f} of the stage before", run_.warn)  # fmt: skip
        pseudo_masks = None
        if stage != run_.config.stage_names[-1] or run_.config.pseudo_mask.of_last_stage:
            pseudo_masks = run_.predict(stage, number, done["model_digest"])
            summary |= {**pseudo_masks.statistics, "rejected": pseudo_masks.rejected}
        summary |= {"rejected_while_training": len(run_.rejects(stage))}
        stages[stage] = {**summary, "per_class_iou": done["per_class_iou"]}
        lineage = run_.lineage(stage, done, previous, learnt_from, pseudo_masks)
        record(run_.outcome(stage, summary, done, lineage))
        previous = done
    return stages


def previous_scores(done: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a stage's best evaluation and of its student; an older version measured neither."""
    figures = {f"best_{key}": done["best"][key] for key in ("mean_iou", "step")} if "best" in done else {}
    return figures | ({"student_mean_iou": done["student"]["mean_iou"]} if "student" in done else {})


def _pool_in_background(
    config: Config, out: str, manifest: Manifest, each: Each, warn: Warn
) -> Callable[[], list[PoolFile]]:
    """Find the files of the pool in a thread, while stage 1, which needs none, trains; returns what waits for them."""
    found: Future[list[PoolFile]] = Future()

    def find() -> None:
        try:
            found.set_result(_find_pool(config, out, manifest, each, warn))
        except BaseException as error:
            found.set_exception(error)
            warn(f"the run will stop after stage 1, its pool cannot be found: {reason_of(error)}")

    threading.Thread(target=find, daemon=True).start()  # daemon: a run that fails does not wait for a long listing
    return found.result


def _find_pool(config: Config, out: str, manifest: Manifest, each: Each, warn: Warn) -> list[PoolFile]:
    """The pool that stage 2 began with; before it begins, what is there now (a rerun takes new images in).

    Raises InputError when there are fewer images than a step needs.
    """
    uri = resolve_part(out, "pool.parquet")
    if uri != storage.join(out, "pool.parquet"):
        if (unlabelled := pool_source(uri)) != config.data.unlabelled:
            raise InputError(
                f"{uri}, which this run reuses, was made with data.unlabelled={unlabelled}, this run has "
                f"{config.data.unlabelled}: set it to that, or leave --reuse out and give another --out",
                "run/other-settings",
            )
        files = load_pool(uri)
        check_pool(config, rows_of(files))
        return files
    files = data_set_files(config.data.root, manifest)
    first = "stage1" if config.stage1.unlabelled_batch > 0 else "stage2"
    if has_started(storage.join(out, first)) and storage.exists(uri):
        pool, unlabelled = load_pool(uri), pool_source(uri)
        if unlabelled != config.data.unlabelled:
            raise InputError(
                f"{uri} was made with data.unlabelled={unlabelled}, this run has {config.data.unlabelled}: give another --out, "
                f"set it back, or delete {storage.join(out, first)} and the stages after it",
                "run/other-settings",
            )
        if not {file.uri for file in files} <= {file.uri for file in pool}:
            warn(
                f"{config.data.root} has new images: this run continues with the pool that {first} began with; to take them "
                f"in, delete {storage.join(out, first)} and the stages after it"
            )
        return pool
    if (more := config.data.unlabelled) is not None:
        if holds_data_set(more):
            files += data_set_files(more, load_manifest(more), own=False)
        else:
            listing = storage.join(out, "listing", hashlib.sha256(more.encode()).hexdigest()[:16])
            list_images(more, listing, LISTED_ROWS_PER_FILE, each)
            files += listed_pool(listing)
    files = list({file.name: file for file in reversed(files)}.values())[::-1]  # a file is named by what is in it
    check_pool(config, rows_of(files))
    write_pool(uri, files, config.data.unlabelled)
    return files


def _digest_of(marker: str) -> str | None:
    """Of the finished set of pseudo-masks that a marker stands for."""
    return str(storage.read_value(marker, "digest", str)) if storage.exists(marker) else None


def has_started(folder: str) -> bool:
    """Whether a stage has trained so far that other inputs would be mixed with what it has learnt."""
    return (
        storage.exists(storage.join(folder, "done.json")) or Checkpoints(checkpoint_folder(folder)).latest() is not None
    )


def _read_or_make_split(config: Config, out: str, elsewhere: str | None, manifest: Manifest) -> Split:
    """The run's split: made once, then read, so that a data set that grows does not change it."""
    uri = elsewhere or storage.join(out, "split.json")
    if not storage.exists(uri):
        if elsewhere is not None:
            raise InputError(
                f"{elsewhere} is missing: the run that this one reuses is gone, or is none; correct --reuse",
                "run/reused-gone",
            )
        return make_split(config.data.root, manifest, config.data)
    split, before = saved_split(uri)
    now = _split_record(config, split)["settings"]
    place = uri.removesuffix("/split.json")
    _refuse_difference(place, "split.json", flatten({"data": before}), flatten({"data": now}))
    return split


def _split_record(config: Config, split: Split) -> dict[str, Any]:
    settings = config.data.model_dump(mode="json", include={"labelled", "split_seed", "validation", "group"})
    return {"settings": settings, "split": split.model_dump(mode="json")}


def _refuse_missing(root: str, split: Split, labelled: SampleSet, validation: SampleSet) -> None:
    """A split that names images which the data set does not hold belongs to another data set."""
    for name, ids, samples in (("labelled", split.labelled, labelled), ("validation", split.validation, validation)):
        missing = sorted(set(ids) - {sample.image_id for sample in samples.samples})
        if missing:
            raise InputError(
                f"{root}: {len(missing)} of the run's {len(ids)} {name} images are not in it, {missing[0]} first: "
                "set data.root to the data set that this run began with, or give another --out",
                "run/other-data-set",
            )


def _refuse_difference(out: str, where: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more: {', '.join(changed[1:4])})" if len(changed) > 1 else ""
        raise InputError(
            f"{storage.join(out, where)} was made with {key}={before.get(key)!r}, this run has {now.get(key)!r}{more}: "
            f"give another --out, set it back, or delete {storage.join(out, where.split('/')[0])} and what follows it",
            "run/other-settings",
        )


def _other_inputs(folder: str, what: str) -> InputError:
    return InputError(
        f"{storage.join(folder, 'inputs.json')}: {folder.rsplit('/', 1)[-1]} was trained with other {what} (the data set, "
        "data.max_image_pixels or the stage before has changed, or an older threestage made them): give another --out, set it "
        f"back, or delete {folder} and the stages after it to train them again; what comes before is kept",
        "run/other-inputs",
    )


@dataclass(frozen=True)
class _Run:
    config: Config
    out: str
    elsewhere: dict[str, str]
    manifest: Manifest
    split: Split
    label_pixels: list[int]
    fixed_void: str | None
    digests: dict[str, str]
    pool: Callable[[], list[PoolFile]]
    run_stage: RunStage
    predict_pool: PredictPool
    warn: Warn
    watch: Watch

    def folder(self, part: str) -> str:
        return self.elsewhere.get(part) or storage.join(self.out, part)

    def train(self, stage: StageName, number: int, pseudo_digest: str | None) -> dict[str, Any]:
        """Train a stage unless its marker says that it is done; returns its result."""
        folder = self.folder(stage)
        inputs = self._inputs(stage, pseudo_digest)
        if stage in self.elsewhere and not storage.exists(storage.join(folder, "done.json")):
            raise InputError(
                f"{storage.join(self.out, REUSED)} names {folder}, which is gone; give another --out", "run/reused-gone"
            )
        self._claim(stage, inputs)
        if not storage.exists(storage.join(folder, "done.json")):
            if not has_started(folder):
                storage.delete(storage.join(folder, "rejects"), folder if stage in self.elsewhere else self.out)
            self.run_stage(
                StageTask(
                    stage=stage,
                    # without registry, whose URI may hold a password
                    config=self.config.for_stage(stage).model_dump(mode="json", exclude={"registry"}),
                    manifest_version=self.manifest.version,
                    split=self.split,
                    folder=folder,
                    pool=None if self.config.stage(stage).unlabelled_batch == 0 else self._pool_list(),
                    pseudo_masks=None if number == 1 else self.folder(f"pseudo_masks{number - 1}"),
                    previous_model=None if number == 1 else storage.join(self.folder(f"stage{number - 1}"), "model"),
                )
            )
            self._refuse_too_many(stage)
            result = storage.read_json(storage.join(folder, "result.json"), StageResult)
            self._warn_of_thresholds(stage, result["history"])
            marker = {"format": 1, "finished": time.time(), "model_digest": result["model_digest"], **inputs}
            marker["data"] = self._data_set().model_dump(mode="json")
            storage.write_json(storage.join(folder, "done.json"), marker)
        return {"marker": storage.read_json(storage.join(folder, "done.json"), StageMarker)} | dict(
            storage.read_json(storage.join(folder, "result.json"), StageResult)
        )

    def _pool_list(self) -> str:
        """The list of the pool's files, which is waited for."""
        self.pool()
        return self.folder("pool.parquet")

    def _warn_of_thresholds(self, stage: StageName, history: Sequence[Mapping[str, float]]) -> None:
        """A term whose threshold kept no pixel in any row has taught the stage nothing."""
        settings = self.config.for_stage(stage)
        for section, threshold in (
            ("consistency", settings.consistency.confidence_threshold),
            ("pseudo_mask", settings.pseudo_mask.confidence_threshold),
        ):
            kept = [row[name] for row in history if (name := f"kept_share/{section}") in row]
            if threshold > 0 and kept and not any(kept):
                key = f"{section}.confidence_threshold={threshold:g}"
                self.warn(f"{stage}: {key} kept no pixel in the whole stage, so its loss taught nothing: lower it")

    def _data_set(self) -> DataSet:
        root, manifest = self.config.data.root, self.manifest
        name = manifest.name or root.rstrip("/").rpartition("/")[2]
        return DataSet(root=root, name=name, version=manifest.version, digest=manifest.digest)

    def _inputs(self, stage: StageName, pseudo_digest: str | None) -> dict[str, Any]:
        return {
            "code_version": threestage.__version__,
            "pseudo_masks": pseudo_digest,
            **self.digests,
            "keys": stage_keys(self.config, stage),
        }

    def _claim(self, stage: StageName, inputs: dict[str, Any]) -> None:
        """Write down what the stage starts with, or refuse to go on with other inputs."""
        folder = self.folder(stage)
        uri = storage.join(folder, "inputs.json")
        if not has_started(folder):
            storage.write_json(uri, inputs)  # nothing was trained with what an earlier try wrote down
            return
        saved = storage.read_json(uri, StageInputs)
        now = json.loads(json.dumps(inputs))
        _refuse_difference(self.out, f"{stage}/inputs.json", saved["keys"], now["keys"])
        for key, what in (
            ("labelled", "labels"),
            ("validation", "validation images"),
            ("pseudo_masks", "pseudo-masks"),
        ):
            if saved[key] != now[key]:
                raise _other_inputs(folder, what)
        if saved["code_version"] != now["code_version"]:
            self.warn(f"{stage} was made by threestage {saved['code_version']}, this is {now['code_version']}")

    def predict(self, stage: StageName, number: int, model_digest: str) -> PseudoMaskSet:
        """Predict the pool with a stage's model, unless that is done.

        The last stage's pseudo-masks are not trained on: they are what the final model says of the pool.
        """
        folder = self.folder(f"pseudo_masks{number}")
        files = self.pool()
        task = PoolTask(
            destination=folder,
            model_digest=model_digest,
            num_classes=len(self.manifest.classes),
            downscale=self.config.data.downscale,
            max_image_pixels=self.config.data.max_image_pixels,
            batch_size=self.config.pseudo_mask.batch_size,
            used_ids=frozenset(self.split.labelled),
            excluded_ids=frozenset(self.split.validation),
            fixed_void=self.fixed_void,
            precision=self.config.for_stage(stage).training.precision,
        )
        marker, compared = storage.join(folder, "done.json"), self._compared(task, stage)
        task = compared or task
        digest, found = set_digest(task, files), _digest_of(marker)
        comparing = task.model_copy(update={"halfway_model": ""})  # made for a run that compares, they serve any
        as_before = task.model_copy(update={"precision": "auto"})  # an older threestage predicted every pool so
        others = (set_digest(other, files) for other in (comparing, as_before))
        digest = next((other for other in others if other == found), digest)
        if found != digest:
            if f"pseudo_masks{number}" in self.elsewhere:
                raise InputError(
                    f"{folder}, which {storage.join(self.out, REUSED)} names, is gone or of other settings "
                    "(data.max_image_pixels): give another --out",
                    "run/reused-gone",
                )
            self._refuse_new_targets(f"stage{number + 1}", digest)
            reports = self.predict_pool(storage.join(self.folder(stage), "model"), task, files)
            watched = self._watched(f"pseudo-masks {number}", reports, rows_of(files))
            statistics = gather(task, files, watched, self.config.data.max_bad_fraction)
            self._guard(stage, statistics)
            storage.write_json(marker, {"digest": digest, "statistics": statistics.model_dump(mode="json")})
        statistics = storage.read_json(marker, SetMarker)["statistics"]
        return PseudoMaskSet(
            uri=folder,
            digest=digest,
            images=statistics.images,
            rejected=statistics.unreadable,
            statistics=statistics.summary(),
        )

    def _compared(self, task: PoolTask, stage: StageName) -> PoolTask | None:
        """The task with the weights by which the next stage chooses its images, if it does."""
        chooser = self.config.choosing_after(stage)
        if chooser is None:
            return None
        halfway = storage.join(self.folder(stage), HALFWAY_MODEL)
        if not storage.exists(storage.join(halfway, "model.json")):
            raise InputError(
                f"{chooser}.reliable_share={self.config.stage(chooser).reliable_share}: {halfway} is missing, {stage} could "
                f"not write it, or an older threestage trained it; set it to 1, or delete {self.folder(stage)} and what "
                "follows it",
                "run/no-halfway-weights",
            )
        return task.model_copy(update={"halfway_model": halfway})

    def _refuse_new_targets(self, following: str, digest: str) -> None:
        """A stage that has trained with other pseudo-masks keeps them: they are not predicted over."""
        folder = self.folder(following)
        if (
            has_started(folder)
            and storage.read_value(storage.join(folder, "inputs.json"), "pseudo_masks", str | None) != digest
        ):
            raise _other_inputs(folder, "pseudo-masks")

    def _watched(self, what: str, reports: Generator[FileReport], total: int) -> Iterator[FileReport]:
        done = 0
        with contextlib.closing(reports):
            for report in reports:
                done += report.statistics.images + report.statistics.unreadable
                self.watch(what, done, total)
                yield report

    def rejects(self, stage: str) -> list[Reject]:
        """Images that had a pseudo-mask and could not be used when the stage trained, each once."""
        files = storage.list_files(storage.join(self.folder(stage), "rejects"))
        return list({(r.source, r.image_id): r for file in files for r in read_rejects(file)}.values())

    def _refuse_too_many(self, stage: str) -> None:
        rejects = self.rejects(stage)
        if not rejects:
            return
        listed = storage.join(self.folder(stage), "rejects.parquet")
        found = RejectList(rejects)
        found.write(listed)
        if complaint := found.complaint(rows_of(self.pool()), self.config.data.max_bad_fraction, listed):
            raise StageFailure(
                f"{stage}: {complaint}; raise data.max_bad_fraction to continue, or bring the images back and delete "
                f"{self.folder(stage)} to train it again",
                "data/bad-images",
            )
        self.warn(f"{stage}: {len(rejects)} images could no longer be read while it trained: {listed}")

    def _guard(self, stage: StageName, statistics: Statistics) -> None:
        if statistics.unreadable:
            listed = storage.join(self.folder(f"pseudo_masks{stage[-1]}"), "rejects.parquet")
            self.warn(f"{statistics.unreadable} images of the pool could not be used and are left out: {listed}")
        vanished = vanished_classes(statistics, self.label_pixels, self.manifest.classes)
        if vanished:
            check_guard(
                self.config.pseudo_mask.guard,
                f"{stage}: {', '.join(vanished)} vanished from the pseudo-masks",
                self.warn,
            )

    def lineage(
        self,
        stage: StageName,
        done: dict[str, Any],
        previous: dict[str, Any] | None,
        learnt_from: PseudoMaskSet | None,
        made: PseudoMaskSet | None,
    ) -> Lineage:
        """What the stage was trained with: data set and code are those of its marker, which may be older than this run."""
        split, settings, marker = self.split, self.config.for_stage(stage), done["marker"]
        data = marker["data"] if "data" in marker else self._data_set()
        validation = f"{data.name} {'val' if split.validation_split == 'val' else 'carved from train'}"
        if self.config.data.downscale > 1:  # another size gives other figures
            validation += f"{AT_SIZE}{self.config.data.downscale} size"
        teacher = None
        if previous is not None:
            before = f"stage{int(stage[-1]) - 1}"
            model = storage.join(self.folder(before), "model")
            teacher = Teacher(stage=before, model_digest=previous["model_digest"], model=model)
        return Lineage(
            run=self.out,
            stage=stage,
            model_digest=done["model_digest"],
            code_version=marker["code_version"],
            data=data,
            labelled=Images(name=f"{data.name} train", images=len(split.labelled), digest=self.digests["labelled"]),
            validation=Images(name=validation, images=len(split.validation), digest=self.digests["validation"]),
            split_seed=self.config.data.split_seed,
            teacher=teacher,
            learnt_from=learnt_from,
            confidence_threshold=None if learnt_from is None else settings.pseudo_mask.confidence_threshold,
            made=made,
        )

    def verdict(self, stages: Mapping[StageName, Mapping[str, Any]]) -> dict[str, Any]:
        """Whether the unlabelled images paid, as plain JSON: `verdict`, or why there is none, if any stage learnt from them."""
        if self.config.stage1.unlabelled_batch > 0:
            return {"verdict": None, "no_verdict": NO_CONTROL}
        if len(stages) < 2:
            return {"verdict": None}
        first, *_, last = map(self.folder, stages)
        strong_view, groups = self.config.stage1.strong_view, self.split.groups
        verdict = judge(first, last, stages, self.config.seed, strong_view, groups)
        return (
            {"verdict": None, "no_verdict": EARLIER_VERSION}
            if verdict is None
            else {"verdict": verdict.model_dump(mode="json")}
        )

    def outcome(
        self, stage: StageName, summary: dict[str, float], done: dict[str, Any], lineage: Lineage
    ) -> StageOutcome:
        pseudo_masks = {} if lineage.made is None else {"pseudo_masks_digest": lineage.made.digest}
        return StageOutcome(
            stage=stage,
            model=storage.join(self.folder(stage), "model"),
            summary=summary | {f"iou/{name}": iou for name, iou in done["per_class_iou"].items() if iou is not None},
            tags={
                "data_digest": lineage.data.digest,
                "data_version": str(lineage.data.version),
                "encoder": self.config.network.encoder,
                "classes": ",".join(self.manifest.classes),
                "labelled": str(len(self.split.labelled)),
                "model_digest": done["model_digest"],
                "code_version": lineage.code_version,
                **pseudo_masks,
            },
            lineage=lineage,
        )
