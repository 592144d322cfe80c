"""A run as its user starts it: the pipeline, its mirror in MLflow, its pictures. The CLI and jobs/ call this."""

import contextlib
import io
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from threestage import pipeline
from threestage.check import check_store, check_writable
from threestage.config import Config, load
from threestage.data import storage
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.records import MANIFEST_NAME, SplitName, load_manifest
from threestage.data.sets import validation_set
from threestage.data.split import Split
from threestage.data.synthetic import write_scenes
from threestage.errors import InputError, StageFailure
from threestage.evaluation import BATCH
from threestage.local import run_local
from threestage.models.export import load_model
from threestage.pseudo_masks import predict_images
from threestage.registry import Registry, StageRecord, open_registry
from threestage.report import colourise, panel
from threestage.report_page import write_report
from threestage.report_page.figures import CONFIG_NAME, PAGE_NAME
from threestage.reused import part
from threestage.tracking import redact_tree
from threestage.training.worker import default_device

Show = Callable[[str, Mapping[str, float]], None]
DEMO_SCENES: dict[SplitName, int] = {"train": 600, "val": 200, "test": 200}
PICTURES = 6


def run(
    config: Config,
    out: str,
    local: bool,
    show: Show,
    warn: pipeline.Warn,
    watch: pipeline.Watch = lambda what, done, total: None,
    reuse: str | None = None,
) -> dict[str, Any]:
    """Run the three stages, in this process (`local`: nothing is registered) or on Ray with a mirror in MLflow.

    `reuse` is the folder of a run whose finished stages serve this one as far as they would be computed the same.
    Writes results.json, pictures.png and report.html into `out`; returns the results.
    """
    check_store(config, out)
    config, out = config.with_absolute_paths(), storage.absolute(out)
    if local:
        results = run_local(config, out, show, warn, _keeping(config, out), watch, reuse)
        write_pictures(config, out)
        _write_page(out, warn)
        return results
    from threestage.on_ray.train import run_on_ray

    registry = open_registry(config.registry)
    key = _run_key(out)
    status = "FAILED"
    try:
        record = _keeping(config, out, registry.uri, _recorder(registry, config, key, warn))
        results = run_on_ray(config, out, show, warn, record, watch, reuse)
        write_pictures(config, out)
        _write_page(out, warn)
        status = "FINISHED"
    finally:
        with contextlib.suppress(InputError):
            _close(registry, key, status, out)
    return results


def _keeping(
    config: Config,
    out: str,
    tracking_uri: str | None = None,
    record: pipeline.Record = lambda outcome: None,
) -> pipeline.Record:
    """Write the settings down as soon as a stage is done with them, then record the stage."""

    def keep(outcome: pipeline.StageOutcome) -> None:
        tree = config.model_dump(mode="json")
        tree["registry"]["tracking_uri"] = tracking_uri or config.registry.tracking_uri
        storage.write_json(storage.join(out, CONFIG_NAME), redact_tree(tree))
        record(outcome)

    return keep


def _write_page(out: str, warn: pipeline.Warn) -> None:
    """A page that cannot be written does not fail a run that is finished."""
    try:
        write_report(out)
    except (InputError, StageFailure, OSError) as error:
        warn(f"the run is finished but {PAGE_NAME} could not be written: {error}; try `threestage report {out}`")


def _run_key(out: str) -> str:
    """What names this run folder in MLflow, for ever."""
    uri = storage.join(out, "run.json")
    if not storage.exists(uri):
        storage.write_json(uri, {"run_key": uuid.uuid4().hex})
    return str(storage.read_json(uri)["run_key"])


def _recorder(registry: Registry, config: Config, key: str, warn: pipeline.Warn) -> pipeline.Record:
    """Mirror a finished stage in MLflow. The run's folder is the record: a store that is down costs a warning."""

    def record(outcome: pipeline.StageOutcome) -> None:
        try:
            registry.record_stage(
                StageRecord(
                    run_name=config.name,
                    run_key=key,
                    stage=outcome.stage,
                    config=config.model_dump(mode="json"),
                    model_dir=outcome.model,
                    metrics=outcome.history,
                    summary=outcome.summary,
                    tags=outcome.tags,
                )
            )
        except InputError as error:
            warn(f"{outcome.stage} is finished but not registered ({error}); the same command registers it later")

    return record


def _close(registry: Registry, key: str, status: Any, out: str) -> None:
    rejects = [f"pseudo_masks{n}/rejects.parquet" for n in (1, 2, 3)]
    names = ("results.json", "pictures.png", PAGE_NAME, *rejects)
    artifacts = {name: storage.join(out, name) for name in names if storage.exists(storage.join(out, name))}
    summary = {}
    if "results.json" in artifacts:
        stages = storage.read_json(artifacts["results.json"])["stages"]
        summary = {f"{stage}/mean_iou": values["mean_iou"] for stage, values in stages.items()}
    registry.close_run(key, status, summary, artifacts)


def demo_config(out: str, seed: int, overrides: list[str]) -> Config:
    """Make the demo's scenes and data set below `out`, unless they are there; returns the demo's configuration."""
    check_writable(out)
    data, scenes = storage.join(out, "data"), storage.join(out, "scenes")
    if not storage.exists(storage.join(data, MANIFEST_NAME)):
        write_scenes(scenes, DEMO_SCENES, seed)
        ingest(
            scenes, data, IngestSettings(format="camvid", class_map=storage.join(scenes, "class_map.yaml"), name="demo")
        )
    return load("demo", [f"data.root={data}", f"seed={seed}", *overrides])


def write_pictures(config: Config, out: str) -> None:
    """`pictures.png`: image | truth | stage 1 | stage 2 | stage 3 for some validation images."""
    manifest = load_manifest(config.data.root)
    split = Split.model_validate(storage.read_json(storage.join(out, "split.json"))["split"])
    samples = validation_set(config.data.root, manifest, split, config.data.downscale)
    spacing = max(1, len(samples) // PICTURES)
    chosen = [samples.decoded(i) for i in range(0, len(samples), spacing)][:PICTURES]
    images = [decoded.image for decoded in chosen]
    truths = [colourise(decoded.maps["mask"], manifest.colours) for decoded in chosen]
    columns = [("image", images), ("truth", truths)]
    device = default_device()
    for number, stage in enumerate(config.stage_names, 1):
        network = load_model(storage.join(part(out, stage), "model"))[0].to(device)
        predicted = {index: mask.numpy() for index, mask, _, _ in predict_images(network, images, BATCH, device)}
        columns.append((f"stage {number}", [colourise(predicted[i], manifest.colours) for i in range(len(images))]))
    stream = io.BytesIO()
    panel(columns, manifest.classes, manifest.colours).save(stream, format="PNG")
    storage.write_bytes(storage.join(out, "pictures.png"), stream.getvalue())
