"""Why: whoever spends a night of GPUs wants each mistake as one red line before, and none that hides another."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage.checks import preflight, step_time
from threestage.checks import run_check as checks
from threestage.checks.result import CheckOutcome, CheckResult, not_tried, run_check
from threestage.checks.run_check import duration_line, step_line
from threestage.checks.step_time import MeasuredStep, StepSpecification, measure_steps
from threestage.checks.store import check_store
from threestage.config import STAGES, Config
from threestage.data import storage
from threestage.data.records import encode_mask, load_manifest, pool_files
from threestage.models.program import unfinished
from threestage.run_folder import lease

GIB = 2**30


@pytest.fixture
def config(scenes: Path, tmp_path: Path) -> Config:
    return tiny_config(scenes, registry={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"})


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("without_program", "without_onnx"):  # seconds each
        monkeypatch.setattr(checks, name, lambda network, seconds: None)
    monkeypatch.setattr(checks, "missing_packages", lambda: None)


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage takes half a second a step and a GiB."""

    def measured(specification: StepSpecification) -> Iterator[MeasuredStep]:
        for stage in specification.config.stage_names:
            yield MeasuredStep(
                stage=stage, seconds=0.5, images=4, device="a CPU", memory_bytes=GIB, device_bytes=8 * GIB
            )

    monkeypatch.setattr(checks, "measure_here", measured)


def changed(config: Config, section: str, **values: object) -> Config:
    tree = config.model_dump(mode="json")
    tree[section] |= values
    return Config.model_validate(tree)


def lines_of(config: Config, out: Path, local: bool = False) -> dict[str, CheckResult]:
    return {line.name: line for line in checks.check(config, str(out), local)}


# ---- The order, and what depends on what


def test_all_is_well(config: Config, no_steps: None, tmp_path: Path) -> None:
    found = lines_of(config, tmp_path / "run")
    assert list(found) == ["data.root", "--out", "registry.tracking_uri", "input", "classes", "split", "cluster",
                           "stage1", "stage2", "stage3", "duration", "program", "onnx"]  # fmt: skip
    assert not any(line.problem for line in found.values())
    assert "8 labelled images, 6 to validate on" in found["input"].value
    assert "Ray will be started here" in found["cluster"].value
    assert "4 images a step: 0.5 s on a CPU, at most 1 GiB of 8 GiB" in found["stage2"].value
    assert list(tmp_path.iterdir()) == []


def test_without_a_cluster_nothing_is_said_of_it(config: Config, no_steps: None, tmp_path: Path) -> None:
    found = lines_of(config, tmp_path / "run", local=True)
    assert not {"cluster", "registry.tracking_uri", "program"} & set(found) and "duration" in found


def test_a_network_that_cannot_be_exported_is_a_doubt(
    config: Config, no_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checks, "without_program", lambda network, seconds: f"models of {network.encoder} are registered without"
    )
    found = lines_of(config, tmp_path / "run")
    assert found["program"].warning == f"models of {config.network.encoder} are registered without"
    assert (found["program"].problem, found["onnx"].warning) == (None, "not tried: needs program")


def test_an_export_that_takes_long_is_not_waited_for(
    config: Config, no_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "without_program", lambda network, seconds: f"not registered: {unfinished(seconds)}")
    line = lines_of(config, tmp_path / "run")["program"]
    assert line.warning == "not known: torch.export did not end within 15 s; a run and an export give it 300 s"


def test_onnx_is_tried_without_a_registry_too_but_not_without_its_extra(
    config: Config, no_steps: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checks, "without_onnx", lambda network, seconds: f"models of {network.encoder} cannot be exported"
    )
    line = lines_of(config, tmp_path / "run", local=True)["onnx"]
    assert (line.problem, line.warning) == (None, f"models of {config.network.encoder} cannot be exported")
    monkeypatch.setattr(checks, "missing_packages", lambda: "onnx not installed")
    assert "onnx" not in lines_of(config, tmp_path / "run", local=True)


def test_what_fails_hides_nothing_that_does_not_need_it(config: Config, no_steps: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = changed(changed(config, "stage1", labelled_batch=9), "registry", tracking_uri="http://127.0.0.1:1")
    found = lines_of(changed(wrong, "cluster", gpus_per_worker=99), tmp_path / "file" / "run")
    assert [name for name, line in found.items() if line.problem] == [
        "--out", "registry.tracking_uri", "input", "cluster"
    ]  # fmt: skip
    assert found["classes"].value and found["stage1, stage2, stage3, duration"].warning == "not tried: needs cluster"


def test_a_folder_that_another_driver_works_on(config: Config, no_steps: None, tmp_path: Path) -> None:
    held = lease.Lease(str(tmp_path / "run"))
    held.take(print)
    line = lines_of(config, tmp_path / "run", local=True)["driver"]
    assert line.problem is not None and "another driver works on it (process " in line.problem
    (tmp_path / "run" / lease.NAME).write_text(
        (tmp_path / "run" / lease.NAME).read_text().replace(f": {os.getpid()}", ": 2")
    )
    line = lines_of(config, tmp_path / "run", local=True)["driver"]
    assert line.problem is None and "is dead, this one takes over" in line.value
    held.release()
    assert "driver" not in lines_of(config, tmp_path / "run", local=True)


def test_without_a_data_set_only_the_rest_is_tried(config: Config, no_steps: None, tmp_path: Path) -> None:
    found = lines_of(changed(config, "data", root=str(tmp_path / "absent")), tmp_path / "run")
    assert [name for name, line in found.items() if line.problem] == ["data.root"]
    doubts = {name: line.warning for name, line in found.items() if line.warning}
    assert set(doubts) == {"input", "classes, split", "stage1, stage2, stage3, duration", "program, onnx"}
    assert set(doubts.values()) == {"not tried: needs data.root"}


def test_a_complaint_of_two_lines_is_said_once(config: Config, no_steps: None, tmp_path: Path) -> None:
    found = lines_of(changed(config, "data", labelled=9000), tmp_path / "run")
    assert "ask for fewer" in str(found["input"].problem) and found["classes"].warning == "not tried: needs input"


def test_local_has_no_address(config: Config) -> None:
    with refused("check/local-address", "--address 127.0.0.1:1", "--local"):
        list(checks.check(config, "out", True, "127.0.0.1:1"))
    with refused("budget/not-by-job", "--budget 5m"):
        list(checks.check(config, "out", False, "http://127.0.0.1:1", "5m"))


def test_a_line_has_a_code(config: Config, no_steps: None, tmp_path: Path) -> None:
    found = lines_of(changed(config, "stage1", labelled_batch=9), tmp_path / "run", local=True)
    assert found["input"].code == "config/batch" and "[" not in str(found["input"].problem)


def test_places_that_cannot_be_used_are_one_error(config: Config, tmp_path: Path) -> None:
    """With their code where they have the same."""
    (tmp_path / "file").write_text("")
    absent, file = str(tmp_path / "absent"), str(tmp_path / "file")
    with refused("data/no-data-set", f"data.root: {absent}"):
        check_store(changed(config, "data", root=absent), str(tmp_path / "run"))
    wrong = changed(changed(config, "data", root=absent), "network", weights=f"{file}s")
    with refused("check/places", f"data.root: {absent}", f"network.weights: {file}s") as error:
        check_store(wrong, str(tmp_path / "run"))
    assert "[" not in error.value.message


def test_lines() -> None:
    assert run_check("a", "b", lambda: CheckOutcome("c", "d"))[:2] == ("a", "c")
    assert not_tried(["a", "b"], ["c"]) == CheckResult("a, b", "", warning="not tried: needs c")


# ---- The data set


def with_masks(monkeypatch: pytest.MonkeyPatch, *ids: int) -> None:
    mask = encode_mask(np.array([list(ids)], np.uint8))
    monkeypatch.setattr(preflight, "_masks_of", lambda *given: {"scene7": mask})


def test_ids_that_are_no_class(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with_masks(monkeypatch, 0, 17, 255)
    with refused("mask/unknown-value", "scene7:", "id 17", "classes 0.."):
        preflight.classes_fit(config, None)


def test_masks_of_ignored_pixels(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with_masks(monkeypatch, 255)
    with refused("data/one-class", "no class", "8 labelled masks"):
        preflight.classes_fit(config, None)


def test_a_mask_that_cannot_be_read(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_masks_of", lambda *given: {"scene7": b"no PNG"})
    with refused("data/unreadable-image", "scene7:"):
        preflight.classes_fit(config, None)


def test_nothing_to_validate_on(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_masks_of", _only_of_train(preflight._masks_of))
    with refused("data/no-validation", config.data.root, "set data.validation"):
        preflight.classes_fit(config, None)


def _only_of_train(sample: Callable[..., dict[str, bytes]]) -> Callable[..., dict[str, bytes]]:
    return lambda root, manifest, split, ids: sample(root, manifest, split, ids) if split == "train" else {}


def test_classes_that_never_occur_are_a_doubt(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with_masks(monkeypatch, 0, 1)
    found = preflight.classes_fit(config, None)
    names = load_manifest(config.data.root).classes
    assert f"no labelled pixel of {', '.join(names[2:])} in 8 labelled masks" in str(found.warning)


def test_one_class_in_a_sample_is_no_reason_to_refuse(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rare classes need not be among the first masks that are read."""
    monkeypatch.setattr(preflight, "SAMPLE", 3)
    both = {"scene7": encode_mask(np.array([[0, 1]], np.uint8))}
    one = {"scene7": encode_mask(np.array([[0, 255]], np.uint8))}
    monkeypatch.setattr(preflight, "_masks_of", lambda root, manifest, split, ids: one if len(ids) == 3 else both)
    assert "8 labelled masks" in str(preflight.classes_fit(config, None).warning)
    monkeypatch.setattr(preflight, "_masks_of", lambda *given: one)
    with refused("data/one-class", "only class background"):
        preflight.classes_fit(config, None)


def test_a_sample_reads_the_masks_of_the_ids(config: Config) -> None:
    manifest = load_manifest(config.data.root)
    ids = preflight.read_split(config, manifest, None).labelled
    assert preflight.sample_of(ids, 3) == (ids[0], ids[3], ids[6]) and preflight.sample_of(ids, 8) == ids
    sample = preflight._masks_of(config.data.root, manifest, "train", preflight.sample_of(ids, 3))
    assert sample.keys() == {ids[0], ids[3], ids[6]}


def test_near_copies_on_both_sides_are_a_doubt(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.sides_differ(config, None) == CheckOutcome(
        f"no near-copies between 8 of 8 labelled and 6 of 6 validation images of {config.data.root}"
    )
    split = preflight.read_split(config, load_manifest(config.data.root), None)
    shared = split.model_copy(update={"validation": split.labelled[:5], "validation_split": "carved"})
    monkeypatch.setattr(preflight, "read_split", lambda *given: shared)
    found = preflight.sides_differ(config, None)
    assert str(found.warning).startswith(
        "5 of 5 validation images nearly equal a labelled one"
    ) and "data.group" in str(found.warning)
    monkeypatch.setattr(preflight, "SAMPLE_OF_IMAGES", 3)
    assert "3 of 8 labelled and 3 of 5 validation" in preflight.sides_differ(config, None).value


def test_the_split_of_a_run_that_has_begun(config: Config, tmp_path: Path) -> None:
    split = {"labelled": ["a"], "validation": ["b"], "validation_split": "carved"}
    storage.write_json(str(tmp_path / "split.json"), {"split": split})
    assert preflight.read_split(config, load_manifest(config.data.root), str(tmp_path)).labelled == ("a",)


# ---- Steps


def measured(**values: Any) -> MeasuredStep:
    given = {"seconds": 0.5, "images": 4, "device": "a GPU", "memory_bytes": 3 * GIB, "device_bytes": 8 * GIB}
    return MeasuredStep.model_validate({"stage": "stage2", **given, **values})


def test_workers_that_do_not_fit_on_a_machine_together(config: Config) -> None:
    assert step_line(config, measured(), 2, 1.0).problem is None
    found = str(step_line(config, measured(), 3, 1.0).problem)
    assert found.startswith("3 workers on this machine need 9 GiB and there are 8 GiB: fewer cluster.workers, or ask")
    assert "training.accumulate=2" in found and "stage2.unlabelled_batch" in found
    assert [step_line(config, measured(), workers, 1.0).code for workers in (2, 3)] == [None, "check/memory"]


def test_workers_that_share_a_gpu(config: Config) -> None:
    shared = changed(config, "cluster", gpus_per_worker=0.33)
    assert "cluster.gpus_per_worker=0.33" in str(step_line(shared, measured(on_gpu=True), 1, 1.0).problem)
    assert step_line(changed(config, "cluster", gpus_per_worker=1), measured(on_gpu=True), 9, 1.0).problem is None


def test_a_gpu_that_is_too_small(config: Config) -> None:
    one = MeasuredStep(stage="stage1", on_gpu=True, problem="does not fit: CUDA out of memory")
    found = str(step_line(config, one, 1, 1.0).problem)
    assert found.startswith("does not fit: CUDA out of memory; ask for less memory: ") and "unlabelled" not in found
    assert step_line(config, one, 1, 1.0).code == "check/memory"
    other = MeasuredStep(stage="stage1", problem="no step could be computed: no kernel")
    assert step_line(config, other, 1, 1.0)[3:5] == (other.problem, "check/no-step")


def test_the_duration_of_what_was_measured(config: Config) -> None:
    stages = [
        measured(stage=stage, seconds=s, image_seconds=0.1) for stage, s in zip(STAGES, (10.0, 0.5, 0.5), strict=True)
    ]
    found = specification(config)
    line = duration_line(found, stages)
    steps = "stage1 6 steps 60 s + stage2 6 steps 3 s + stage3 6 steps 3 s"
    pool = sum(file.rows for file in pool_files(found.manifest))
    assert f"= {steps} + 3 passes over the pool {0.3 * pool:.2g} s + evaluations " in line.value
    assert "; besides: waiting for data" in line.value and line.warning is None


def test_the_duration_of_stages_that_were_not_measured(config: Config) -> None:
    """Every check ends with a duration: one image takes as long as in the stage before, a step that was too slow longer."""
    found, first = specification(config), measured(stage="stage1", seconds=10.0, image_seconds=0.1)
    part = duration_line(found, [first, MeasuredStep(stage="stage2", problem="the process was killed")])
    assert "stage1 6 steps 60 s + stage2 6 steps 2.0 min + stage3 6 steps 2.0 min" in part.value
    assert str(part.warning).endswith("stage2 and stage3 not measured: by the images of a step")
    slow = duration_line(found, [step_time.too_slow("stage1")])
    assert slow.value.startswith("more than 20.0 min = stage1 6 steps 4.0 min + stage2 6 steps 8.0 min")
    assert "without the pool" in str(slow.warning) and "its first step takes longer than 40 s" in str(slow.warning)
    assert duration_line(found, []).warning == "not estimated: no step was measured"


def specification(config: Config, use_gpu: bool = False) -> StepSpecification:
    return StepSpecification(config=config, manifest=load_manifest(config.data.root), use_gpu=use_gpu)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "MOST_STEPS", 3)
    monkeypatch.setattr(step_time, "disable_malloc_trim", lambda: None)


def test_a_dry_step_of_each_stage(config: Config, few_steps: None) -> None:
    threads = torch.get_num_threads()
    found = list(measure_steps(specification(config)))
    assert [one.stage for one in found] == ["stage1", "stage2", "stage3"] and [one.images for one in found] == [2, 4, 4]
    for one in found:
        assert one.problem is None and one.seconds > 0 and 2**27 < one.memory_bytes < one.device_bytes
    assert torch.get_num_threads() == threads


def test_a_step_that_fails_is_a_line_and_the_next_stage_is_tried(
    config: Config, few_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step_time.measure_step

    def fail(config: Config, stage: Any, *rest: Any) -> Any:
        if stage == "stage1":
            raise RuntimeError("no kernel\nfor that")
        return real(config, stage, *rest)

    monkeypatch.setattr(step_time, "measure_step", fail)
    first, second, _ = measure_steps(specification(config))
    assert first.problem == "no step could be computed: RuntimeError: no kernel" and second.seconds > 0


class Process:
    """Stands in for the one that measures."""

    def __init__(self, *lines: bytes, code: int = 0) -> None:
        self.stdout, self._code = iter(lines), code

    def wait(self) -> int:
        return self._code


def read(process: Any, complaints: bytes, tmp_path: Path) -> list[MeasuredStep]:
    with open(tmp_path / "complaints", "w+b") as file:
        file.write(complaints)
        given: Any = SimpleNamespace(config=SimpleNamespace(stage_names=("stage1", "stage2")), stage_seconds=0.0)
        return list(step_time._read(process, given, file))


def test_a_process_that_ends_early(tmp_path: Path) -> None:
    first = measured(stage="stage1").model_dump_json().encode() + b"\n"
    *_, last = read(Process(first, code=-9), b"", tmp_path)
    assert last.stage == "stage2" and "want of memory" in str(last.problem)
    (only,) = read(Process(code=1), b"Traceback\nImportError: no torch\n", tmp_path)
    assert only.problem == "no step could be computed: ImportError: no torch"


def test_a_stage_that_is_too_slow_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "START_S", 0.0)
    monkeypatch.setattr(step_time, "STEP_S", 0.05)
    forever, never = Process(), threading.Event()
    forever.stdout = (b"" for _ in iter(never.wait, True))
    (found,) = read(forever, b"", tmp_path)
    never.set()
    assert found.warning == "not measured: its first step takes longer than 0 s" and found.problem is None
