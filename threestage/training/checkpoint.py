"""A stage's checkpoints: all that a killed stage (SIGKILL too) needs to continue as if nothing had happened.

checkpoints/step-000000500.pt    student, teacher, optimiser, history, best weights …: one file, written whole
checkpoints/latest.json          the one to continue from; written after it
checkpoints/rows.json            the history again, for those who want no more of it
checkpoints/owner.json           which process may write here
"""

import contextlib
import io
import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from threestage.data import storage
from threestage.data.outages import store_away
from threestage.data.storage_errors import unwritable
from threestage.errors import StageFailure, UnwritablePlace, Warn
from threestage.models.network import without_auxiliary
from threestage.run_folder.records import HistoryRow
from threestage.settings import Settings
from threestage.training.background_writer import BackgroundWriter, WriteState

FORMAT, WITHOUT_BEST = 3, 2
POINTER, OWNER, ROWS = "latest.json", "owner.json", "rows.json"

Row = dict[str, float]  # "step" and the values measured there


class BestWeights(NamedTuple):
    """The evaluation with the highest mean IoU (in [0,1]) so far, of equals the first, and the weights that had it: of the
    shipped network without its auxiliary head, in host memory, never changed."""

    step: int
    mean_iou: float
    weights: dict[str, Tensor]


class StreamPosition(NamedTuple):
    """Where one worker's part of a Ray stream stands (ray_backend/pool_stream.py). Rows are numbered through all passes.

    block_rows: of each block; first: the stream began with this row; number: the worker's buffer begins with this row;
    taken: the rows that were taken out of the buffer.
    """

    block_rows: int
    first: int
    number: int
    taken: tuple[int, ...] = ()


class StreamState(NamedTuple):
    """Where the workers' parts stand, by rank, and which later rows groups of other sizes had used before."""

    positions: list[StreamPosition]
    used: list[int]


@dataclass
class TrainState:
    """Everything that changes while a stage trains. Random state is not among it: draws depend on the step alone."""

    student: nn.Module
    teacher: nn.Module | None
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    labelled_images: int = 0  # taken by all workers together
    unlabelled_images: int = 0
    stream: StreamState | None = None  # on Ray
    seconds: float = 0.0
    history: list[Row] = field(default_factory=list)
    best: BestWeights | None = None  # of rank 0

    @property
    def shipped(self) -> nn.Module:
        """The network that the stage delivers: the teacher where there is one."""
        return self.student if self.teacher is None else self.teacher

    def keep_best(self, mean_iou: float) -> None:
        """Copy the shipped weights, which score so, where no evaluation before scored as high; NaN is no score."""
        if mean_iou > (-1.0 if self.best is None else self.best.mean_iou):
            self.best = BestWeights(self.step, mean_iou, copied(without_auxiliary(self.shipped.state_dict())))

    def snapshot(self) -> dict[str, Any]:
        """A copy in host memory that later steps do not change: plain values and tensors."""
        return {
            "format": FORMAT,
            "student": copied(self.student.state_dict()),
            "teacher": None if self.teacher is None else copied(self.teacher.state_dict()),
            "optimiser": copied(self.optimiser.state_dict()),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "labelled_images": self.labelled_images,
            "unlabelled_images": self.unlabelled_images,
            "stream": self.stream and [[tuple(each) for each in self.stream.positions], self.stream.used],
            "seconds": self.seconds,
            "history": list(self.history),
            "best": None if self.best is None else self.best._asdict(),
        }

    def restore(self, content: bytes) -> None:
        """Go on from a checkpoint, in place. StageFailure on a format that this version does not know."""
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if saved["format"] not in (FORMAT, WITHOUT_BEST):
            raise StageFailure(
                f"the checkpoint has format {saved['format']}, this version reads {WITHOUT_BEST} and {FORMAT}; "
                "continue with the version that wrote it, or give another --out",
                "stage/checkpoint-format",
            )
        self.student.load_state_dict(saved["student"])
        if self.teacher is not None:
            self.teacher.load_state_dict(saved["teacher"])
        self.optimiser.load_state_dict(saved["optimiser"])
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]
        self.labelled_images, self.unlabelled_images = saved["labelled_images"], saved["unlabelled_images"]
        if saved.get("stream"):
            positions, used = saved["stream"]
            self.stream = StreamState([StreamPosition(*position) for position in positions], used)
        self.best = BestWeights(**saved["best"]) if saved.get("best") else None


def copied(value: Any) -> Any:
    """A copy in host memory that later steps do not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def not_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether any value of the float tensors is infinite or NaN; reads one number back from the device."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return not bool(torch.stack(torch._foreach_norm(floats)).isfinite().all())


def checkpoint_folder(stage_folder: str) -> str:
    return storage.join(stage_folder, "checkpoints")


class Pointer(Settings):
    """What latest.json says."""

    step: int = 0
    unlabelled_images: int = 0
    stream: list[StreamPosition] | None = None
    """by rank, without the rows that were taken"""


class StaleWorkerError(Exception):
    """A process that was taken for lost has found that another one trains its stage."""


class Checkpoints:
    """The checkpoints in a folder. One process writes; any may read.

    Writing happens in a thread beside the training, one checkpoint at a time. `driver` names who started the process: one
    that starts it again takes the folder over from its own lost process, another driver's is told. In an outage of the store
    `unsaved_limit_s` of work may be unsaved.
    """

    def __init__(
        self, folder: str, keep: int = 2, driver: str = "", unsaved_limit_s: float = math.inf, warn: Warn = print
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._owner = {"driver": driver or secrets.token_hex(8), "process": secrets.token_hex(8)}
        self._last_good: int | None = None
        self._writer = BackgroundWriter(unsaved_limit_s, warn, self.refusal)

    def latest(self) -> Pointer | None:
        """The checkpoint to go on from, or None when the stage has saved none."""
        uri = storage.join(self._folder, POINTER)
        found = storage.read_json(uri, Pointer) if storage.exists(uri) else None
        self._last_good = None if found is None else found.step
        return found

    def read(self, step: int) -> bytes:
        return storage.read_bytes(self._uri(step))

    def rows(self) -> list[Row]:
        """The history up to the checkpoint to go on from."""
        latest, uri = self.latest(), storage.join(self._folder, ROWS)
        if latest is None or not storage.exists(uri):
            return []
        return [row for row in storage.read_json(uri, list[HistoryRow]) if row["step"] <= latest.step]

    def claim(self) -> None:
        """From now on this process alone may save here: one that claimed the folder before is refused."""
        storage.write_json(storage.join(self._folder, OWNER), self._owner)
        self._writer.work_is_saved()

    def save(self, snapshot: dict[str, Any]) -> None:
        """Write a snapshot of the state in the background; it takes the place of one that waits. Raises as `wait`."""
        self._writer.submit("checkpoint", f"the checkpoint of step {snapshot['step']}", lambda: self._write(snapshot))

    def publish(self, what: str, write: Callable[[], object]) -> None:
        """Write what a stage delivers, as checkpoints are written, before any that comes later. Raises as `wait`."""

        def write_if_ours() -> None:
            self._refuse_when_taken_over()
            write()

        self._writer.submit(what, what, write_if_ours)

    def in_background(self, what: str, work: Callable[[], object]) -> None:
        """Whatever else needs the stores, such as reading from them. Raises as `wait`."""
        self._writer.submit(what, what, work, writes=False)

    def wait(self, timeout_s: float | None = None) -> WriteState:
        """Until what was saved is written, or for some seconds. Raises UnwritablePlace when the folder takes no writes any more,
        StaleWorkerError or StageFailure when another process of the same driver, or another driver, has taken the stage over."""
        return self._writer.wait(timeout_s)

    def times_overdue(self) -> int:
        """How often training had to wait because the store was away for too long. Raises as `wait`."""
        return self._writer.times_overdue()

    def unsaved_seconds(self) -> float:
        """Of work since the last checkpoint, or since the stage started."""
        return self._writer.unsaved_seconds()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """What trains the stage, inside: raises UnwritablePlace when its folder takes no writes any more, StoreAway where it
        needed a store that is away. At the end nothing is tried again."""
        try:
            with store_away():
                yield
        except OSError as error:
            if (refusal := self.refusal(error)) is not None:
                raise refusal from error
            raise
        finally:
            self._writer.close()

    def refusal(self, error: OSError) -> UnwritablePlace | None:
        """The end of the stage, when its folder takes no writes any more."""
        good = (
            "no checkpoint is saved"
            if self._last_good is None
            else f"the last good checkpoint is of step {self._last_good}"
        )
        return unwritable(self._folder.rpartition("/")[0], error, good)

    def _write(self, snapshot: dict[str, Any]) -> None:
        content = io.BytesIO()
        torch.save(snapshot, content)
        storage.write_bytes(self._uri(snapshot["step"]), content.getbuffer())
        self._refuse_when_taken_over()
        storage.write_json(storage.join(self._folder, ROWS), snapshot["history"])
        stream = [StreamPosition(*position[:3]) for position in snapshot["stream"][0]] if snapshot["stream"] else None
        pointer = Pointer(step=snapshot["step"], unlabelled_images=snapshot["unlabelled_images"], stream=stream)
        storage.write_json(storage.join(self._folder, POINTER), pointer.model_dump(exclude_none=True))
        self._last_good = pointer.step
        stage_folder = self._folder.rpartition("/")[0]
        for step in sorted(step for step in self._steps() if step <= pointer.step)[: -self._keep]:
            storage.delete(self._uri(step), within=stage_folder)

    def _refuse_when_taken_over(self) -> None:
        owner = storage.read_json(storage.join(self._folder, OWNER), dict[str, str])
        if owner.get("driver") != self._owner["driver"]:
            raise StageFailure(
                f"{self._folder}: another run has taken this stage over, this one stops", "run/taken-over"
            )
        if owner != self._owner:
            raise StaleWorkerError(f"{self._folder}: another process trains this stage now")

    def _uri(self, step: int) -> str:
        return storage.join(self._folder, f"step-{step:09d}.pt")

    def _steps(self) -> list[int]:
        names = [uri.rsplit("/", 1)[-1] for uri in storage.list_files(self._folder)]
        return [int(name[5:-3]) for name in names if name.startswith("step-") and name.endswith(".pt")]
