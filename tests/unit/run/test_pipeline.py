"""A run that is killed anywhere and started again must end where an undisturbed one ends, and never mix two inputs."""

import inspect
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.conftest import local_config, tiny_config
from tests.refusals import refused
from tests.runs import copy_run, run_local
from tests.store_away import StoreAway
from threestage.cli.app import main
from threestage.data import storage
from threestage.data.batches import SampleSet
from threestage.data.ingest import IngestSettings, ingest
from threestage.data.pool import PoolFile
from threestage.data.records import load_manifest
from threestage.data.synthetic import write_scenes
from threestage.errors import StageFailure
from threestage.evaluation import Evaluation, evaluate_model
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.export import load_model
from threestage.models.network import without_auxiliary
from threestage.prediction.predict import open_model
from threestage.prediction.pseudo_masks import PoolTask
from threestage.run import stages
from threestage.run.local_backend import LocalBackend
from threestage.run.outcome import StageOutcome
from threestage.training.metrics import class_counts


class Killed(BaseException):
    """Stands in for kill -9: nothing in the program catches it."""


def quiet(stage: str, row: Mapping[str, float]) -> None:
    pass


def weights(out: Path) -> list[bytes]:
    return [(out / stage / "model" / "model.safetensors").read_bytes() for stage in ("stage1", "stage2", "stage3")]


@pytest.fixture(scope="module")
def undisturbed(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(finished_run, tmp_path_factory.mktemp("undisturbed") / "run")


def test_the_pool_is_predicted_in_the_precision_of_training(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()

    def predict_pool(backend: LocalBackend, model: str, task: PoolTask, files: Sequence[PoolFile]) -> NoReturn:
        seen.append(task.precision)
        raise Killed

    monkeypatch.setattr(LocalBackend, "predict_pool", predict_pool)
    with pytest.raises(Killed):
        run_local(local_config(scenes, training__precision="bfloat16"), str(tmp_path / "run"), quiet)
    assert seen == ["bfloat16"]


def test_an_outage_between_the_stages_is_waited_out(
    scenes: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run then continues from what is done, as the same command would."""
    store, warnings, out = StoreAway(monkeypatch, "results.json"), list[str](), copy_run(finished_run, tmp_path / "run")
    (out / "results.json").unlink(missing_ok=True)

    def warn(text: str) -> None:
        warnings.append(text)
        if "the store is away" in text:
            store.down.clear()

    store.down.set()
    run_local(local_config(scenes), str(out), quiet, warn)
    assert (out / "results.json").is_file() and weights(out) == weights(finished_run)
    assert store.failed == 1 and any("answers again" in text for text in warnings)


def test_results_name_every_stage(undisturbed: Path) -> None:
    results = json.loads((undisturbed / "results.json").read_text())
    assert list(results["stages"]) == ["stage1", "stage2", "stage3"]
    for figures in results["stages"].values():
        assert 0 <= figures["mean_iou"] <= 1 and 0 < figures["mean_confidence"] < 1
        assert {"pseudo_mask_mean_iou", "share_above_0.9", "mean_entropy", "seconds"} <= set(figures)


def test_last_best_and_student_are_told(undisturbed: Path) -> None:
    """Evaluated once, at the last step: that is the best one too, and there is one model."""
    for stage, figures in json.loads((undisturbed / "results.json").read_text())["stages"].items():
        result = json.loads((undisturbed / stage / "result.json").read_text())
        assert result["last"] == {"step": 6, "mean_iou": result["mean_iou"]}
        assert result["best"] == {**result["last"], "model": "model"}
        assert not (undisturbed / stage / "best_model").exists()
        assert (figures["best_mean_iou"], figures["best_step"]) == (result["mean_iou"], 6)
        assert figures.get("student_mean_iou") == result.get("student", {}).get("mean_iou")
        assert ("student" in result) == (stage != "stage1")


def test_the_student_is_scored_like_the_teacher(scenes: Path, undisturbed: Path) -> None:
    saved = torch.load(undisturbed / "stage2/checkpoints/step-000000006.pt", weights_only=True)
    result = json.loads((undisturbed / "stage2/result.json").read_text())
    network, card = load_model(str(undisturbed / "stage2/model"))
    for name, mean_iou in (("teacher", result["mean_iou"]), ("student", result["student"]["mean_iou"])):
        network.load_state_dict(without_auxiliary(saved[name]))
        assert evaluate_model(network, card, str(scenes), "val")["mean_iou"] == mean_iou


def scored(mean_iou: float, samples: SampleSet, classes: int) -> Evaluation:
    right = torch.eye(classes, dtype=torch.int64)
    confusion = round(1000 * mean_iou) * right + round(500 * (1 - mean_iou)) * right.roll(1, 0)
    return Evaluation(confusion, class_counts(confusion).expand(len(samples), -1, -1))


def test_an_earlier_step_that_scored_higher_has_a_model_of_its_own(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 is best at step 4 of 6; it is killed between its last checkpoint and its result, and continued."""
    scores = iter([0.1, 0.2, 0.3, 0.2, 0.5, 0.4, 0.3, 0.4, 0.3])  # at steps 2, 4, 6 and of the student
    monkeypatch.setattr(
        stages, "evaluate", lambda network, samples, classes, *rest: scored(next(scores), samples, classes)
    )
    publish, tries = stages.publish_stage, itertools.count()

    def dying(task: stages.StageTask, *rest: Any) -> None:
        if task.stage == "stage2" and next(tries) == 0:
            raise Killed
        publish(task, *rest)

    monkeypatch.setattr(stages, "publish_stage", dying)
    config = local_config(scenes, stages=2, training__evaluate_every=2)
    with pytest.raises(Killed):
        run_local(config, str(tmp_path), quiet)
    results = run_local(config, str(tmp_path), quiet)
    first, second = (json.loads((tmp_path / stage / "result.json").read_text()) for stage in ("stage1", "stage2"))
    assert first["best"] == pytest.approx({"step": 6, "mean_iou": 0.3, "model": "model"})
    assert second["last"] == pytest.approx({"step": 6, "mean_iou": 0.4})
    assert second["student"] == pytest.approx({"mean_iou": 0.3})
    assert second["best"] == pytest.approx({"step": 4, "mean_iou": 0.5, "model": "best_model"})
    told = results["stages"]["stage2"]
    assert (told["mean_iou"], told["best_mean_iou"], told["student_mean_iou"]) == pytest.approx((0.4, 0.5, 0.3))
    assert next(scores, None) is None and not (tmp_path / "stage1/best_model").exists()

    saved = torch.load(tmp_path / "stage2/checkpoints/step-000000004.pt", weights_only=True)
    best, card = open_model(str(tmp_path / "stage2/best_model"), RegistrySettings())
    last, last_card = open_model(str(tmp_path / "stage2"), RegistrySettings())
    assert all(
        torch.equal(best.state_dict()[name], value) for name, value in without_auxiliary(saved["teacher"]).items()
    )
    assert any(not torch.equal(best.state_dict()[name], value) for name, value in last.state_dict().items())
    assert card == last_card and evaluate_model(best, card, str(scenes), "val")["stage"] == "stage2"


def test_a_run_of_an_older_version_is_read(scenes: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = copy_run(undisturbed, tmp_path / "run")
    for stage in ("stage1", "stage2", "stage3"):
        uri = out / stage / "result.json"
        result = json.loads(uri.read_text())
        uri.write_text(json.dumps({key: result[key] for key in result.keys() - {"last", "best", "student"}}))
    outcomes: list[StageOutcome] = []
    results = run_local(local_config(scenes), str(out), quiet, record=outcomes.append)
    assert len(outcomes) == 3
    assert all("mean_iou" in figures and "best_mean_iou" not in figures for figures in results["stages"].values())


KILLS = [
    [("stage1", 3), ("stage2", 2), ("stage3", 5)],
    *(pytest.param([(stage, step)], marks=pytest.mark.slow) for stage in ("stage1", "stage2") for step in (1, 4)),
]


@pytest.mark.parametrize("kills", KILLS, ids=str)
def test_killed_and_continued_without_the_test_split_it_reaches_the_same_weights_bit_for_bit(
    scenes: Path, undisturbed: Path, tmp_path: Path, kills: list[tuple[str, int]]
) -> None:
    """No stage reads the test split: its files are gone."""
    root, left = Path(shutil.copytree(scenes, tmp_path / "data")), list(kills)
    tests = [root / file.path for file in load_manifest(str(root)).files if file.split == "test"]
    assert tests
    for file in tests:
        file.unlink()

    def die(stage: str, row: Mapping[str, float]) -> None:
        if (stage, row["step"]) in left:
            left.remove((stage, int(row["step"])))
            raise Killed

    config, out = local_config(root, training__log_every=1), tmp_path / "run"
    for _ in kills:
        with pytest.raises(Killed):
            run_local(config, str(out), die)
        assert not (out / "results.json").exists()
    run_local(config, str(out), die)
    assert not left and weights(out) == weights(undisturbed)


def test_a_rerun_trains_nothing_and_records_everything_again(scenes: Path, undisturbed: Path) -> None:
    rows: list[Any] = []
    outcomes: list[StageOutcome] = []
    run_local(local_config(scenes), str(undisturbed), lambda stage, row: rows.append(row), record=outcomes.append)
    assert rows == []
    assert [outcome.stage for outcome in outcomes] == ["stage1", "stage2", "stage3"]


def test_each_stage_says_what_it_learnt_from(scenes: Path, undisturbed: Path) -> None:
    outcomes: list[StageOutcome] = []
    run_local(local_config(scenes), str(undisturbed), quiet, record=outcomes.append)
    one, two, three = (outcome.lineage for outcome in outcomes)
    assert one.teacher is None and one.learnt_from is None and one.confidence_threshold is None
    for teacher, student in ((one, two), (two, three)):
        assert student.teacher is not None and student.learnt_from is not None
        assert (student.teacher.stage, student.teacher.model_digest) == (teacher.stage, teacher.model_digest)
        assert student.learnt_from == teacher.made
        assert storage.read_json(f"{undisturbed}/{student.stage}/inputs.json")["pseudo_masks"] == teacher.made.digest
    assert three.made is not None and three.confidence_threshold == 0
    assert {(found.data, found.labelled, found.validation) for found in (one, two, three)} == {
        (one.data, one.labelled, one.validation)
    }
    assert (one.data.digest, one.labelled.images) == (load_manifest(str(scenes)).digest, 8)


def test_other_settings_are_refused_by_name(scenes: Path, undisturbed: Path) -> None:
    with refused("run/other-settings", "stage2/inputs.json", "consistency.weight=0.25", "0.5", "with --reuse "):
        run_local(local_config(scenes, consistency__weight=0.5), str(undisturbed), quiet)
    with refused("run/other-settings", "split.json", "data.labelled=8", "9"):
        run_local(local_config(scenes, data__labelled=9), str(undisturbed), quiet)


def test_another_data_set_is_refused(scenes: Path, undisturbed: Path, tmp_path: Path) -> None:
    write_scenes(str(tmp_path / "more"), {"train": 5}, seed=9)
    masks = IngestSettings(format="camvid", class_map=str(tmp_path / "more" / "class_map.yaml"))
    ingest(str(tmp_path / "more"), str(tmp_path / "data"), masks)
    with refused("run/other-data-set", tmp_path / "data", "data.root"):
        run_local(local_config(tmp_path / "data"), str(undisturbed), quiet)


def test_new_images_need_only_their_own_pseudo_masks(scenes: Path, undisturbed: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(scenes, root)
    copy_run(undisturbed, out)
    before = {file.name: file.stat().st_mtime_ns for file in (out / "pseudo_masks1").glob("train-*.parquet")}
    more = tmp_path / "more"
    write_scenes(str(more), {"train": 5}, seed=9)
    ingest(str(more / "train" / "images"), str(root), IngestSettings(format="images"))
    assert load_manifest(str(root)).version == 2
    warnings: list[str] = []
    assert run_local(local_config(root), str(out), quiet, warnings.append)["data"]["pool"] == 40
    assert any("has new images: this run continues with the pool that stage2 began with" in text for text in warnings)
    shutil.rmtree(out / "stage2")
    with refused("run/other-inputs", "stage3", "pseudo-masks"):
        run_local(local_config(root), str(out), quiet)
    after = {file.name: file.stat().st_mtime_ns for file in (out / "pseudo_masks1").glob("train-*.parquet")}
    assert len(after) == len(before) + 1 and before.items() <= after.items()
    shutil.rmtree(out / "stage3")
    assert run_local(local_config(root), str(out), quiet)["data"]["pool"] == 45


def test_a_finished_run_keeps_its_pool_and_refuses_another_source(
    scenes: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = copy_run(undisturbed, tmp_path / "run")
    config = local_config(scenes)
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"unlabelled": str(scenes)})})
    with refused("run/other-settings", "data.unlabelled=None", scenes, f"delete {out}/stage2"):
        run_local(elsewhere, str(out), quiet, lambda text: None)
    larger = config.model_copy(update={"data": config.data.model_copy(update={"max_image_pixels": 10**7})})
    before = {file.name: file.stat().st_mtime_ns for file in (out / "pseudo_masks1").iterdir()}
    with refused("run/other-inputs", "stage2", "pseudo-masks"):
        run_local(larger, str(out), quiet)
    assert {file.name: file.stat().st_mtime_ns for file in (out / "pseudo_masks1").iterdir()} == before


def test_sources_that_share_files_count_them_once(scenes: Path, tmp_path: Path) -> None:
    config = local_config(
        scenes, data__unlabelled=str(scenes), stages=1, stage1__steps=1, pseudo_mask__final_stage=False
    )
    assert run_local(config, str(tmp_path), quiet)["data"]["pool"] == 40


def test_a_pool_of_which_nothing_is_left_stops_the_run(scenes: Path, tmp_path: Path) -> None:
    config = local_config(scenes, stage1__steps=1, data__max_image_pixels=64 * 64 - 1, data__max_bad_fraction=1.0)
    with refused("data/bad-images", "no image of the pool", "rejects.parquet", error=StageFailure):
        run_local(config, str(tmp_path), quiet)


def test_guard_stops_when_asked(scenes: Path, tmp_path: Path) -> None:
    with refused("stage/collapsed", "stage1", "pseudo_mask.on_collapse=stop", error=StageFailure):
        run_local(tiny_config(scenes, stage1__steps=1, pseudo_mask__on_collapse="stop"), str(tmp_path), quiet)


def test_diverging_training_stops_with_the_step(scenes: Path, tmp_path: Path) -> None:
    config = local_config(scenes, optimiser__learning_rate=1e30, optimiser__encoder_learning_rate=1e30)
    with refused(
        "stage/diverged", "supervised_loss", "step 2", "train/", "optimiser.learning_rate", error=StageFailure
    ):
        run_local(config, str(tmp_path), quiet)


POOLED = {"network__head": "deeplabv3plus", "stage1__labelled_batch": 2}


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"stage1__labelled_batch": 9}, "config/batch", ["stage1.labelled_batch=9", "8 labelled images"]),
        (
            {"training__batch_scope": "global", "cluster__workers": [1, 3]},
            "config/batch",
            ["stage1.labelled_batch=2", "training.batch_scope=global", "up to 3 workers"],
        ),
        (
            {"training__batch_scope": "global", "stage1__labelled_batch": 9},
            "config/batch",
            ["stage1.labelled_batch=9", "8 labelled images"],
        ),
        (POOLED | {"stage1__labelled_batch": 1}, "config/batch", ["stage1.labelled_batch=1 leaves one image"]),
        (
            POOLED | {"training__accumulate": 2},
            "config/batch",
            ["stage1.labelled_batch=2 leaves one image", "set stage1.labelled_batch=4"],
        ),
        (
            POOLED | {"training__batch_scope": "global", "cluster__workers": [1, 2]},
            "config/batch",
            ["stage1.labelled_batch=2 leaves one image", "up to 2 workers (cluster.workers)"],
        ),
        (
            {"training__batch_scope": "global", "cluster__workers": 2, "consistency__cutmix": 0.5},
            "config/batch",
            ["stage2.unlabelled_batch=2", "cluster.workers: up to 2", "set cutmix to 0"],
        ),
        (
            {
                "network__batch_norm": "live",
                "training": {"batch": "global", "accumulate": 4},
                "cluster": {"workers": 3, "gpus_per_worker": 1},
                "stage1__labelled_batch": 4,
                "stage2__labelled_batch": 3,
                "stage3__labelled_batch": 3,
            },
            "config/batch",
            ["training.accumulate=4: in stage1", "has 1,", "cluster.sync_batch_norm"],
        ),
        ({"stage2__unlabelled_batch": 99}, "config/batch", ["stage2.unlabelled_batch=99", "40 unlabelled"]),
        ({"data__labelled": 99}, "data/too-few-labels", ["data.labelled", "99", "40 labelled train images"]),
        ({"network__encoder": "test_resnt"}, "network/unknown-encoder", ["'test_resnt'", "test_resnet"]),
        ({"network__weights": "/none.pth"}, "network/unreadable-weights", ["/none.pth"]),
        ({"data__root": "/nope"}, "data/no-data-set", ["/nope/manifest.json"]),
    ],
)
def test_bad_input_is_refused_before_training(
    scenes: Path, tmp_path: Path, changes: dict[str, object], code: str, named: list[str]
) -> None:
    with refused(code, *named):
        run_local(local_config(scenes, **changes), str(tmp_path), quiet)
    assert not (tmp_path / "stage1").exists()


@pytest.mark.slow
def test_warm_start_begins_with_the_previous_stage(scenes: Path, tmp_path: Path) -> None:
    """With a learning rate of almost zero, a warm-started stage 2 must ship stage 1's weights."""
    slow = {"optimiser__learning_rate": 1e-12, "optimiser__encoder_learning_rate": 1e-12, "network__batch_norm": "live"}
    out = run_local(local_config(scenes, stage2__warm_start=True, stages=2, **slow), str(tmp_path / "warm"), quiet)
    cold = run_local(local_config(scenes, stages=2, **slow), str(tmp_path / "cold"), quiet)

    def head(folder: str, stage: str) -> list[float]:
        network, _ = load_model(str(tmp_path / folder / stage / "model"))
        return [float(p.detach().abs().sum()) for p in network.main_head.parameters()]

    assert head("warm", "stage2") == pytest.approx(head("warm", "stage1"), rel=1e-4, abs=1e-9)  # biases begin at 0
    assert head("cold", "stage2") != pytest.approx(head("cold", "stage1"), rel=1e-4)
    assert len(out["stages"]) == len(cold["stages"]) == 2


def test_the_way_from_the_command_to_the_loop_is_short(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each frame is one step down: command, run, pipeline, backend, stage, loop."""
    seen: list[str] = []

    def fit(*_: object) -> NoReturn:
        files = [frame for frame in inspect.stack() if "/threestage/" in frame.filename]
        seen.extend(f"{Path(frame.filename).stem}.{frame.function}" for frame in reversed(files))
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "fit", fit)
    small = ["--set", "data.labelled=8", "--set", "augment.crop_size=[32, 32]"]
    words = ["threestage", "run", "demo", "--local", "--set", f"data.root={scenes}", *small]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path / "run")])
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main()
    way = seen[seen.index("runs.run") :]
    assert way == [
        "runs.run", "runs.run_shown", "run.run_checked", "pipeline.run", "pipeline.train", "local_backend.train_stage",
        "stages.train_stage",
    ], "and the loop, the eighth"  # fmt: skip
