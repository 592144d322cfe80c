"""The loop with batches made beforehand: pieces, precisions, divergence, notices, and what a checkpoint brings back."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fixed_steps import FixedSteps, network, new_state
from tests.refusals import refused
from tests.small_disk import fill
from tests.store_away import StoreAway, busy
from tests.waiting import wait_for
from threestage.data.batches import Batch, BatchSlice
from threestage.errors import StageFailure, UnwritablePlace
from threestage.models.network import without_auxiliary
from threestage.private_folder import private_folder, reserve_compile_cache
from threestage.training import background_writer, loop
from threestage.training.checkpoint import Pointer, Row, TrainState
from threestage.training.loop import LoopSettings, StageLength, fit, lr_scale, resume
from threestage.training.schedule import EmaSettings, OptimiserSettings
from threestage.training.step import StepInputs
from threestage.training.worker import LocalWorker

STEPS = 8


class Poisoned(FixedSteps):
    """Step 7 holds an image that is not finite."""

    def draw(self, step: int) -> StepInputs:
        inputs = super().draw(step)
        return replace(inputs, image=inputs.image * float("inf")) if step == 6 else inputs


def no_images(share: BatchSlice, first_image: int) -> Iterator[Batch]:
    return iter(())


def worker(folder: Path, rows: list[Row] | None = None) -> LocalWorker:
    return LocalWorker(str(folder), 2, no_images, lambda row: None if rows is None else rows.append(dict(row)))


def good(shipped: object) -> Row:
    return {"mean_iou": 0.5}


def train(
    state: TrainState, where: LocalWorker, source: Any = None, steps: int = STEPS, evaluate: Any = good, **loop: Any
) -> TrainState:
    resume(state, where)
    fit(
        state, where, source or FixedSteps(), evaluate, StageLength(steps, (2, 4), (0,)),
        LoopSettings(**({"log_every": 2, "checkpoint_every": 4, "evaluate_every": 4} | loop)),
        OptimiserSettings(learning_rate=1e-3), EmaSettings(),
    )  # fmt: skip
    where.checkpoints.wait()
    return state


def parameters(state: TrainState) -> Tensor:
    return torch.cat([parameter.detach().float().flatten() for parameter in state.student.parameters()])


def test_a_stage_that_goes_on_ends_where_an_undisturbed_one_ends(tmp_path: Path) -> None:
    whole = train(new_state(), worker(tmp_path / "whole"))
    train(new_state(), worker(tmp_path / "killed"), steps=5)
    again = new_state()
    resume(again, worker(tmp_path / "killed"))
    assert (again.step, again.labelled_images, again.unlabelled_images) == (5, 5 * 2, 5 * 4)
    train(again, worker(tmp_path / "killed"))
    assert torch.equal(parameters(whole), parameters(again))
    assert [row["step"] for row in again.history] == [2, 4, 5, 6, 8]


class Scores:
    """Evaluations that give these figures, one after the other."""

    def __init__(self, *scores: float) -> None:
        self._scores = iter(scores)

    def __call__(self, shipped: object) -> Row:
        return {"mean_iou": next(self._scores)}


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ((0.2, 0.5, 0.4, 0.3), 4),
        ((0.2, 0.3, 0.4, 0.5), 8),
        ((0.5, 0.5, 0.2, 0.5), 2),
        ((float("nan"), 0.0, 0, 0), 4),
    ],
)
def test_the_best_evaluation_keeps_its_weights(tmp_path: Path, scores: tuple[float, ...], step: int) -> None:
    state = train(new_state(), worker(tmp_path / "whole"), evaluate=Scores(*scores), evaluate_every=2)
    then = train(new_state(), worker(tmp_path / "then"), steps=step, evaluate_every=100)
    assert state.best is not None and (state.best.step, state.best.mean_iou) == (step, scores[step // 2 - 1])
    expected = without_auxiliary(then.shipped.state_dict())
    assert state.best.weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.best.weights.items())


def test_what_is_not_better_copies_nothing(tmp_path: Path) -> None:
    state = train(new_state(), worker(tmp_path), steps=4)
    best = state.best
    state.step = 6
    for score in (0.5, 0.1, float("nan")):
        state.keep_best(score)
    assert best is not None and state.best is best
    assert all(a is b for a, b in zip(state.snapshot()["best"]["weights"].values(), best.weights.values(), strict=True))


def test_a_stage_that_goes_on_knows_what_was_best(tmp_path: Path) -> None:
    whole = train(new_state(), worker(tmp_path / "whole"), evaluate=Scores(0.2, 0.6, 0.4, 0.5), evaluate_every=2)
    train(new_state(), worker(tmp_path / "killed"), evaluate=Scores(0.2, 0.6, 0.1), evaluate_every=2, steps=5)
    again = train(new_state(), worker(tmp_path / "killed"), evaluate=Scores(0.4, 0.5), evaluate_every=2)
    assert whole.best is not None and again.best is not None
    assert (again.best.step, again.best.mean_iou) == (whole.best.step, whole.best.mean_iou) == (4, 0.6)
    assert all(torch.equal(value, again.best.weights[name]) for name, value in whole.best.weights.items())


def test_only_rank_0_keeps_the_best(tmp_path: Path) -> None:
    class Second(LocalWorker):
        rank = 1

        def gather(self, value: Any) -> list[Any]:
            return [4 if value is None else value]  # None is where it resumes from

    train(new_state(), worker(tmp_path), steps=4)
    state = train(new_state(), Second(str(tmp_path), 2, lambda share, first_image: iter(())))
    assert state.step == 8 and state.best is None


@pytest.mark.parametrize(("format", "known"), [(2, True), (1, False), (4, False)])
def test_a_checkpoint_of_the_version_before_is_read(format: int, known: bool) -> None:
    """It has no best weights: the next evaluation is the first that counts."""
    old, new = new_state(), new_state()
    old.step, old.seconds = 7, 1.5
    saved = old.snapshot() | {"format": format}
    del saved["best"]
    content = io.BytesIO()
    torch.save(saved, content)
    if not known:
        with refused("stage/checkpoint-format", f"format {format}", "2 and 3", error=StageFailure):
            new.restore(content.getvalue())
        return
    new.restore(content.getvalue())
    assert (new.step, new.seconds, new.best) == (7, 1.5, None)
    new.keep_best(0.0)
    assert new.best is not None and new.best.step == 7


def test_every_parameter_gets_a_gradient() -> None:
    """DDP is told not to look for parameters without one."""
    student, inputs = network(), FixedSteps().draw(0)
    main, auxiliary = student(inputs.image, with_auxiliary=True)
    (main.sum() + auxiliary.sum()).backward()
    assert [name for name, value in student.named_parameters() if value.requires_grad and value.grad is None] == []


@pytest.mark.parametrize("accumulate", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 9))])
def test_pieces_give_the_gradients_of_the_whole_batch(tmp_path: Path, accumulate: int) -> None:
    whole = train(new_state(network().double()), worker(tmp_path / "whole"), FixedSteps(dtype=torch.float64))
    pieces = train(
        new_state(network().double()),
        worker(tmp_path / "pieces"),
        FixedSteps(dtype=torch.float64),
        accumulate=accumulate,
    )
    torch.testing.assert_close(parameters(pieces), parameters(whole), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns(tmp_path: Path, precision: str) -> None:
    state = train(new_state(precision=precision), worker(tmp_path), steps=20, precision=precision)
    assert state.history[-1]["supervised_loss"] < state.history[0]["supervised_loss"]
    again = new_state(precision=precision)
    resume(again, worker(tmp_path))
    assert again.scaler.state_dict() == state.scaler.state_dict() and again.scaler.is_enabled() == (
        precision == "float16"
    )


def test_channels_last_is_the_same_to_rounding(tmp_path: Path) -> None:
    plain = train(new_state(), worker(tmp_path / "plain"), steps=5)
    student = network().to(memory_format=torch.channels_last)
    other = train(new_state(student), worker(tmp_path / "other"), steps=5)
    torch.testing.assert_close(parameters(other), parameters(plain), rtol=1e-2, atol=1e-4)


def test_a_loss_that_is_not_finite_names_step_images_and_checkpoint(tmp_path: Path) -> None:
    named = ("nan in step 7", "image0, image1", "checkpoint is of step 5", "optimiser.learning_rate")
    with refused("stage/diverged", *named, error=StageFailure):
        train(new_state(), worker(tmp_path), Poisoned(), checkpoint_every=5)


def test_an_exploding_loss_stops_the_stage(tmp_path: Path) -> None:
    with refused("stage/diverged", "training.loss_limit=0.1 in step 1", "no checkpoint", error=StageFailure):
        train(new_state(), worker(tmp_path), loss_limit=0.1)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Breaking(FixedSteps):
        def draw(self, step: int) -> StepInputs:
            if step == 5:
                next(state.student.parameters()).data[0] = float("nan")
            inputs = super().draw(step)
            silent = {name: torch.full_like(target, 255) for name, target in inputs.targets.items()}
            return replace(inputs, targets=silent)  # no loss shows what the weights are

    state = new_state()
    with refused("stage/diverged", "checkpoint is of step 4", error=StageFailure):
        train(state, worker(tmp_path), Breaking())
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt")) == ["step-000000004.pt"]


def test_a_sigterm_saves_a_checkpoint_at_once_and_stops(tmp_path: Path) -> None:
    class Terminated(FixedSteps):
        def draw(self, step: int) -> StepInputs:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().draw(step)

    where = worker(tmp_path)
    with refused("stage/stopped", "SIGTERM", "step 4", error=StageFailure), where.listening():
        train(new_state(), where, Terminated(), log_every=5, checkpoint_every=5)
    again = new_state()
    resume(again, worker(tmp_path))
    assert again.step == 4 and [row["step"] for row in again.history] == [4]


def test_a_sigterm_that_no_step_answers_stops_the_run_too(tmp_path: Path) -> None:
    where = worker(tmp_path)
    with refused("stage/stopped", "SIGTERM", error=StageFailure), where.listening():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("limit_s", [100, 0.01])
def test_an_outage_ends_nothing_and_long_ones_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float
) -> None:
    """The store is away from step 6 on: until step 12, or until training says that it waits."""
    store, down_at, warnings = StoreAway(monkeypatch), list[int](), list[str]()

    class Watched(FixedSteps):
        def draw(self, step: int) -> StepInputs:
            if step == 5:
                store.down.set()
            if step == 7:
                wait_for(lambda: warnings)
                time.sleep(0.02)
            if store.down.is_set():
                down_at.append(step)
            if step == 12:
                store.down.clear()
            return super().draw(step)

    def warn(text: str) -> None:
        warnings.append(text)
        if "training waits" in text:
            store.down.clear()

    where = LocalWorker(str(tmp_path), 2, no_images, warn=warn, unsaved_limit_s=limit_s)
    state = train(new_state(), where, Watched(), steps=14, checkpoint_every=2)
    latest = worker(tmp_path).checkpoints.latest()
    assert latest is not None and latest.step == 14 and state.step == 14
    assert down_at == (list(range(5, 13)) if limit_s == 100 else [5, 6, 7])
    assert any("training waits" in text for text in warnings) == (limit_s < 1)
    assert "answers again" in warnings[-1]


def test_a_sigterm_ends_the_wait_for_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StoreAway(monkeypatch)

    class Terminated(FixedSteps):
        def draw(self, step: int) -> StepInputs:
            if step == 12:
                store.down.set()
                os.kill(os.getpid(), signal.SIGTERM)
            return super().draw(step)

    where = worker(tmp_path)
    ended = refused("stage/stopped", "step 13 could not be written", error=StageFailure)
    with ended, where.listening(), where.checkpoints.writing():
        train(new_state(), where, Terminated(), steps=14)


def test_a_store_that_never_answers_holds_no_step_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 6 to step 12, longer than a checkpoint may take: others of a group would wait for this worker."""
    store, warnings = StoreAway(monkeypatch), list[str]()
    monkeypatch.setattr(background_writer, "SILENT_S", 0.05)

    class Watched(FixedSteps):
        def draw(self, step: int) -> StepInputs:
            if step == 5:
                store.silent.set()
            if step == 12:
                store.silent.clear()
            return super().draw(step)

    where = LocalWorker(str(tmp_path), 2, no_images, warn=warnings.append)
    train(new_state(), where, Watched(), steps=14, checkpoint_every=2)
    assert where.checkpoints.latest() == Pointer(step=14, unlabelled_images=14 * 4)
    assert "no answer for" in warnings[0] and "answers again" in warnings[-1]


def test_a_stage_that_is_continued_waits_for_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(new_state(), worker(tmp_path), steps=5)
    store, warnings = StoreAway(monkeypatch), list[str]()

    def warn(text: str) -> None:
        warnings.append(text)
        store.down.clear()

    store.down.set()
    again = new_state()
    resume(again, LocalWorker(str(tmp_path), 2, no_images, warn=warn))
    assert again.step == 5 and len(warnings) == 2
    assert "is tried again" in warnings[0] and "training continues" not in warnings[0] and "again" in warnings[1]


def test_compiling_changes_no_environment_while_threads_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(torch, "compile", lambda network: network)
    reserve_compile_cache()
    before = dict(os.environ)
    loop.compiled(torch.nn.Identity(), LoopSettings(compile=True))
    assert dict(os.environ) == before and Path(before["TORCHINDUCTOR_CACHE_DIR"]).parent == private_folder()


class Rank(LocalWorker):
    """One of two, in a thread of its own."""

    def __init__(self, folder: Path, rank: int, said: list[Any], both: threading.Barrier) -> None:
        super().__init__(str(folder), 2, no_images, warn=lambda text: None)
        self.rank, self._said, self._both, self.gathered = rank, said, both, 0

    def gather(self, value: Any) -> list[Any]:
        self._said[self.rank] = value
        self._both.wait(10)
        found, self.gathered = list(self._said), self.gathered + 1
        self._both.wait(10)
        return found


def test_all_workers_wait_for_the_one_that_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the others would give it up while they wait in a collective call."""
    store, both, tries = StoreAway(monkeypatch), threading.Barrier(2), list[int]()
    said: list[Any] = [None, None]
    ranks = [Rank(tmp_path, rank, said, both) for rank in range(2)]

    def read(rank: int) -> int:
        if rank == 1 and len(tries) < 30:
            tries.append(rank)
            raise busy()
        return rank

    with ThreadPoolExecutor(2) as threads:
        found = threads.map(lambda worker: loop.read_together("labels", lambda: read(worker.rank), worker), ranks)
        assert list(found) == [0, 1]
    assert ranks[0].gathered == ranks[1].gathered > 1 and not store.failed


def test_a_place_that_is_full_ends_the_stage_at_once(small_disk: Path) -> None:
    """A real file system: the checkpoint of step 10 fits, that of step 12 does not."""
    rows: list[Row] = []

    class Filling(FixedSteps):
        def draw(self, step: int) -> StepInputs:
            if step == 11:
                where.checkpoints.wait()
                fill(small_disk)
            return super().draw(step)

    where = worker(small_disk / "stage1", rows)
    expected = (small_disk, "no space left", "of step 10;", "make room")
    with refused("stage/unwritable", *expected, error=UnwritablePlace):
        train(new_state(), where, Filling(), steps=2000, checkpoint_every=2, log_every=1, evaluate_every=10_000)
    assert rows[-1]["step"] < 100


def test_evaluation_is_no_part_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, evaluated = time.perf_counter, list[int]()

    def slow(shipped: object) -> Row:
        evaluated.append(1)
        return good(shipped)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1000 * len(evaluated))
    rows: list[Row] = []
    state = train(new_state(), worker(tmp_path, rows), steps=4, evaluate=slow, evaluate_every=2)
    assert max(row["step_seconds"] for row in rows) < 100, "1000 s in a row of 2 steps would be 500 s each"
    assert state.seconds > 2000


def test_rows_say_what_a_step_costs(tmp_path: Path) -> None:
    rows: list[Row] = []
    state = train(new_state(), worker(tmp_path, rows), steps=4)
    assert rows == state.history and [row["step"] for row in rows] == [2, 4]
    last = rows[-1]
    assert last["images_per_second"] == pytest.approx(6 * last["steps_per_second"])
    assert last["data_wait_seconds"] == 0 and last["memory_bytes"] > 2**20 and last["workers"] == 1
    assert 0.5 < last["kept_share/supervised"] < 0.7
    assert last["step_seconds"] == pytest.approx(1 / last["steps_per_second"])


@pytest.mark.parametrize(
    ("settings", "factor"),
    [({}, 1), ({"learning_rate_rule": "sqrt"}, 2), ({"learning_rate_rule": "linear"}, 4),
     ({"learning_rate_rule": "linear", "batch_scope": "global"}, 1)],
)  # fmt: skip
def test_learning_rate_rule(settings: dict[str, Any], factor: float) -> None:
    assert lr_scale(LoopSettings(**settings), 4) == factor


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    plain = train(new_state(), worker(tmp_path / "plain"), steps=5)
    fast = train(new_state(), worker(tmp_path / "fast"), steps=5, compile=True)
    torch.testing.assert_close(parameters(fast), parameters(plain), rtol=1e-2, atol=1e-4)
