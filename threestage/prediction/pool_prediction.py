"""Predict the pool file by file and write the pseudo-masks: `predict_files` drives it, `_Job.publish` writes a file.

Reads and decodes ahead of the device, encodes and publishes behind it:

    one thread         reads the next rows (by reference, others fetch the images)
    some threads       decode the images of the next batches, encode the results of the last ones
    the caller's       makes batches of one size and gives them to the device
    one thread         compresses what is encoded, in the order of the rows; a few publish the files that are complete

What waits between them is bounded, so memory depends neither on the length of a file nor on that of the pool. Batches
are a function of a file's rows alone: a file predicted again is the same to the bit on the same machine.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.batches import send
from threestage.data.datasets import unpacked
from threestage.data.headers import BadImage
from threestage.data.parallel import ahead
from threestage.data.pool import AGREEMENT, PSEUDO_MASK_SCHEMA, PoolFile, PoolRow
from threestage.data.records import DECODER_ERRORS, decoder_complaint
from threestage.data.rejects import Reject
from threestage.data.samples import Decoded, Sample, decode_sample
from threestage.data.storage_errors import refuse_unwritable
from threestage.models.export import load_model
from threestage.models.network import Network, size_multiple
from threestage.prediction.memory import LEAST_PIXELS, most_pixels
from threestage.prediction.pool_features import PoolFeatures
from threestage.prediction.prediction_writer import Encoded, PredictionWriter, Unwritable
from threestage.prediction.pseudo_masks import (
    DIGEST_KEY,
    REPORT_KEY,
    FileReport,
    PoolTask,
    Statistics,
    agreement,
    agreement_counts,
    file_digest,
    images_at_once,
    pixel_statistics,
    quantise,
    stored_report,
)
from threestage.prediction.tta import TTASettings, predict_in_windows
from threestage.training.loop import autocast_dtype
from threestage.training.worker import default_device

WAITING_BYTES = 256 * 2**20
WAITING_ROWS = 256
BATCHES_IN_FLIGHT = 2
UNPUBLISHED_FILES = 4


def writer_of(task: PoolTask, device: torch.device) -> PredictionWriter:
    """What a task makes of the pool."""
    product = PoolFeatures(task.num_classes) if task.features else PredictionWriter()
    product.precision = task.precision
    product.protocol = TTASettings.model_validate(task.inference.model_dump())
    if task.halfway_model is not None:
        product.schema = PSEUDO_MASK_SCHEMA.append(AGREEMENT)
        product.other = load_model(task.halfway_model)[0].to(device)
    return product


def predict_files(
    network: nn.Module,
    task: PoolTask,
    files: Sequence[PoolFile],
    device: torch.device,
    product: PredictionWriter | None = None,
) -> Iterator[FileReport]:
    """Predict files; yields their reports, in their order, each once the file's pseudo-masks are published, atomically.

    A file that was predicted with the same model and settings is kept, and its stored report given. An image that
    cannot be used is a reject and a null row. Raises OSError when the store fails.
    """
    product = product or writer_of(task, device)
    predictor = _Predictor(network, task, device, product)  # it measures the memory: no other thread may take some yet
    threads = max(2, torch.get_num_threads())
    with ExitStack() as stack:
        workers, writer, publishers = (
            stack.enter_context(ThreadPoolExecutor(count)) for count in (threads, 1, UNPUBLISHED_FILES)
        )
        encoders = stack.enter_context(ThreadPoolExecutor(product.writers)) if product.writers else workers
        jobs = _jobs(task, files, writer, product)
        images = stack.enter_context(closing(_decoded(jobs, task, workers, task.batch_size + threads)))
        reports: deque[Future[FileReport]] = deque()
        for job, found in groupby(images, key=itemgetter(0)):
            predictor.predict(job, (image for _, image in found if image is not None), encoders)
            reports.append(publishers.submit(job.publish))
            while reports and (len(reports) >= UNPUBLISHED_FILES or reports[0].done()):
                yield reports.popleft().result()
        while reports:
            yield reports.popleft().result()


def predict_pool_here(model: str, task: PoolTask, files: Sequence[PoolFile]) -> Generator[FileReport]:
    """`predict_files` with the model in a folder, on this process's device."""
    device = default_device()
    yield from predict_files(load_model(model)[0].to(device), task, files, device)


@dataclass(frozen=True)
class _Image:
    """One row of a file. `decoded` is None where nothing is predicted: `problem` then says why, and is None where the
    row is not in the pool."""

    position: int
    row: PoolRow
    decoded: Decoded | None
    problem: str | None

    @property
    def pixels(self) -> np.ndarray:
        assert self.decoded is not None
        return self.decoded.image

    @property
    def mask(self) -> np.ndarray | None:
        assert self.decoded is not None
        return self.decoded.maps.get("mask")


def _decode(position: int, row: PoolRow, task: PoolTask) -> _Image:
    """A row's image at the size in which it is predicted, with its mask where that was not trained on."""
    if row.replaced or row.image_id in task.excluded_ids:
        return _Image(position, row, None, None)
    if row.problem is not None:
        return _Image(position, row, None, row.problem)
    sample = Sample(row.image_id, row.image, None if row.image_id in task.used_ids else row.mask)
    try:
        decoded = decode_sample(sample, task.downscale, task.max_image_pixels, task.bands)
    except BadImage as error:
        return _Image(position, row, None, str(error))
    except DECODER_ERRORS as error:
        return _Image(position, row, None, f"its mask {decoder_complaint(error)} [mask/damaged]")
    image = _Image(position, row, decoded, None)
    if 0 in image.pixels.shape:
        return _Image(position, row, None, f"is smaller than data.downscale={task.downscale} [image/too-small]")
    if image.mask is not None and image.mask.shape != image.pixels.shape[:2]:
        shapes = f"its mask has the shape {image.mask.shape}, it {image.pixels.shape[:2]}"
        return _Image(position, row, None, f"{shapes} [mask/size]")
    return image


def _jobs(
    task: PoolTask, files: Sequence[PoolFile], writer: ThreadPoolExecutor, product: PredictionWriter
) -> Iterator[tuple["_Job", list[PoolRow]]]:
    """The rows of the files that are not done yet, in chunks, and once every file without rows."""
    task_digest = task.digest()
    for file in files:
        job = _Job(task, file, task_digest, writer, product)
        yield job, []
        if job.stored is None:
            for rows in product.rows(file):
                yield job, rows


def _decoded(
    jobs: Iterator[tuple["_Job", list[PoolRow]]], task: PoolTask, workers: ThreadPoolExecutor, depth: int
) -> Generator[tuple["_Job", _Image | None]]:
    """The rows in their order, about `depth` of them decoded ahead; None stands for no row, so that no file is missing."""
    waiting: deque[tuple[_Job, Future[_Image] | None]] = deque()
    with closing(ahead(jobs)) as chunks:
        for job, rows in chunks:
            waiting.append((job, None))
            for row in rows:
                waiting.append((job, workers.submit(_decode, job.next_position(), row, task)))
                while len(waiting) > depth or _held_bytes(waiting) > WAITING_BYTES:
                    yield _finished(waiting.popleft())
        while waiting:
            yield _finished(waiting.popleft())


def _held_bytes(waiting: Iterable[tuple["_Job", Future[_Image] | None]]) -> int:
    """Of the images that are decoded."""
    images = (future.result() for _, future in waiting if future is not None and future.done())
    return sum(image.pixels.nbytes for image in images if image.decoded is not None)


def _finished(entry: tuple["_Job", "Future[_Image] | None"]) -> tuple["_Job", _Image | None]:
    job, image = entry
    return job, None if image is None else image.result()


def one_size_batches(images: Iterable[_Image], batch_size: int, most_pixels: int = 2**62) -> Iterator[list[_Image]]:
    """Batches of images of one size, at most as many as `images_at_once` says and as have `most_pixels` together.

    An image waits for others of its size until WAITING_ROWS more rows have come, WAITING_BYTES wait, or the file ends.
    """
    waiting: dict[tuple[int, ...], list[_Image]] = {}  # the size that waits longest comes first
    held = 0
    for image in images:
        size = image.pixels.shape
        waiting.setdefault(size, []).append(image)
        held += image.pixels.nbytes
        if len(waiting[size]) >= min(images_at_once(size, batch_size), max(1, most_pixels // (size[0] * size[1]))):
            held -= len(waiting[size]) * image.pixels.nbytes
            yield waiting.pop(size)
        while waiting and (held > WAITING_BYTES or image.position - _oldest(waiting)[0].position >= WAITING_ROWS):
            batch = waiting.pop(_oldest(waiting)[0].pixels.shape)
            held -= len(batch) * batch[0].pixels.nbytes
            yield batch
    yield from waiting.values()


def _oldest(waiting: dict[tuple[int, ...], list[_Image]]) -> list[_Image]:
    return next(iter(waiting.values()))


@dataclass(frozen=True)
class _Outcome:
    """What a batch gave, on the CPU as soon as `ready`: class ids and confidence (N,H,W) uint8, agreement (N,) uint8, sums as
    `Statistics.of` takes them; measured (N,K), see `PredictionWriter.measure`."""

    class_ids: Tensor
    confidence: Tensor
    agreement: Tensor | None
    measured: Tensor | None
    sums: Tensor
    ready: torch.cuda.Event | None

    def encoded(self, product: PredictionWriter, index: int, image: _Image) -> Encoded:
        self._wait()
        class_ids, confidence = self.class_ids[index].numpy(), self.confidence[index].numpy()
        agreed = () if self.agreement is None else (int(self.agreement[index]),)
        measured = () if self.measured is None else product.measured_columns(self.measured[index].numpy())
        return *product.encode(image.row, image.pixels, class_ids, confidence), *agreed, *measured

    def total(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The sums, and that of what was measured."""
        self._wait()
        return self.sums.numpy(), None if self.measured is None else self.measured.double().sum(0).numpy()

    def _wait(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()


class _Predictor:
    """Gives batches to the device, at most BATCHES_IN_FLIGHT before the first of them is encoded."""

    def __init__(self, network: nn.Module, task: PoolTask, device: torch.device, product: PredictionWriter) -> None:
        self._network = network
        self._task = task
        self._device = device
        self._product = product
        self._dtype = autocast_dtype(product.precision, device)
        self._void = None
        if task.fixed_void is not None:
            self._void = torch.from_numpy(unpacked(task.fixed_void)).bool().to(device)
        self._in_flight: deque[list[Future[Encoded]]] = deque()
        self._multiple = size_multiple(network.settings) if isinstance(network, Network) else 1
        key = (type(product), product.protocol, self._dtype)
        self._most_pixels = most_pixels(network, lambda pixels: self._classes(pixels, 2**62), device, key)

    def predict(self, job: "_Job", images: Iterable[_Image], encoders: ThreadPoolExecutor) -> None:
        """Predict the images of one file; all of its rows are settled then."""
        for batch in one_size_batches(job.usable(images), self._task.batch_size, self._most_pixels):
            self._predict_batch(job, batch, encoders)
        job.send_rest()

    def _predict_batch(self, job: "_Job", batch: list[_Image], encoders: ThreadPoolExecutor) -> None:
        """A batch that does not fit into the device's memory is tried image by image, an image in smaller windows."""
        while len(self._in_flight) >= BATCHES_IN_FLIGHT:
            wait(self._in_flight.popleft())
        height, width = batch[0].pixels.shape[:2]
        most = self._most_pixels
        outcome = self._launch(batch, most)
        while outcome is None and len(batch) == 1 and (most := min(most, height * width) // 4) >= LEAST_PIXELS:
            outcome = self._launch(batch, most)
        if outcome is not None:
            encoded = [
                encoders.submit(outcome.encoded, self._product, index, image) for index, image in enumerate(batch)
            ]
            job.complete(batch, encoded, encoders.submit(outcome.total), in_windows=height * width > most)
            self._in_flight.append(encoded)
        elif len(batch) == 1:
            job.reject(
                batch[0],
                f"its {width}x{height} pixels do not fit into the memory of the device ({self._device}) "
                "[image/too-many-pixels]",
            )
        else:
            for image in batch:
                self._predict_batch(job, [image], encoders)

    def _launch(self, batch: list[_Image], most_pixels: int) -> _Outcome | None:
        """None where the device has too little memory."""
        try:
            return self._forward(batch, most_pixels)
        except (torch.OutOfMemoryError, MemoryError):
            return None
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # of torch's allocator of the CPU
                raise
            return None

    def _classes(
        self, pixels: Tensor, most_pixels: int, network: nn.Module | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Class, confidence and entropy of images (N,3,H,W); larger ones than `most_pixels` are cut into windows."""
        network, product = network or self._network, self._product
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            if pixels.shape[-2] * pixels.shape[-1] <= most_pixels:
                return product.predict(network, pixels)
            return predict_in_windows(network, pixels, product.protocol, self._multiple, most_pixels)

    @torch.inference_mode()
    def _forward(self, batch: list[_Image], most_pixels: int) -> _Outcome:
        """Does not wait for a GPU: results are copied to the CPU behind the computation. The sums are of whole images."""
        pixels = send(torch.from_numpy(np.stack([image.pixels for image in batch])), self._device).permute(0, 3, 1, 2)
        with self._product.measure(self._network) as measured_of:
            class_ids, confidence, entropy = self._classes(pixels, most_pixels)
        measured = measured_of(entropy)
        agreed: Tensor | None = None
        if self._product.other is not None:
            others = self._classes(pixels, most_pixels, self._product.other)[0]
            agreed = agreement(class_ids, others, self._task.num_classes)
        masks = [image.mask for image in batch]
        sums = pixel_statistics(class_ids, confidence, entropy, masks, self._task.num_classes)
        if agreed is not None:
            sums, agreed = torch.cat([sums, agreement_counts(agreed)]), agreed.to("cpu", non_blocking=True)
        if measured is not None:
            measured = measured.to("cpu", non_blocking=True)
        if self._void is not None and self._void.shape == class_ids.shape[1:]:
            class_ids = class_ids.masked_fill(self._void, IGNORE_INDEX)
        class_ids, confidence, sums = (
            tensor.to("cpu", non_blocking=True) for tensor in (class_ids, quantise(confidence), sums)
        )
        return _Outcome(class_ids, confidence, agreed, measured, sums, _recorded_event(self._device))


def _recorded_event(device: torch.device) -> torch.cuda.Event | None:
    """Comes to pass when the device has done what it was given so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)
    event.record()
    return event


class _Job:
    """One file in the making: rows are settled in any order and leave for the Parquet file in theirs."""

    def __init__(
        self, task: PoolTask, file: PoolFile, task_digest: str, writer: ThreadPoolExecutor, product: PredictionWriter
    ) -> None:
        self._task = task
        self._file = file
        self._uri = product.uri(task, file)
        self._digest = file_digest(task_digest, file)
        self._writer = writer
        self._positions = 0
        self._settled: dict[int, tuple[str, Future[Encoded] | None]] = {}  # those that have not left
        self._left = 0  # how many rows have
        self._writes: list[Future[None]] = []
        self._predicted: list[tuple[int, str, int, int]] = []  # position, image id, height and width
        self._sums: list[Future[tuple[np.ndarray, np.ndarray | None]]] = []
        self._sums_measured = product.sums_measured
        self._rejects: list[tuple[int, Reject]] = []
        self._unwritten: set[int] = set()
        self._in_windows = 0
        self._sink = pa.BufferOutputStream()
        # without its schema, whose metadata readers would see instead of what is added at the end
        self._parquet = pq.ParquetWriter(
            self._sink,
            product.schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            store_schema=False,
        )
        self.stored = stored_report(self._uri, self._digest)

    def next_position(self) -> int:
        self._positions += 1
        return self._positions - 1

    def usable(self, images: Iterable[_Image]) -> Iterator[_Image]:
        """Those to predict; the others are settled."""
        for image in images:
            if image.decoded is not None:
                yield image
            elif image.problem is not None:
                self.reject(image, image.problem)
            else:
                self._complete_image(image, None)

    def reject(self, image: _Image, reason: str) -> None:
        row = image.row
        self._rejects.append((image.position, Reject(image_id=row.image_id, source=row.source, reason=reason)))
        self._complete_image(image, None)

    def complete(
        self,
        batch: list[_Image],
        encoded: list[Future[Encoded]],
        sums: Future[tuple[np.ndarray, np.ndarray | None]],
        in_windows: bool,
    ) -> None:
        self._sums.append(sums)
        self._in_windows += len(batch) * in_windows
        for image, result in zip(batch, encoded, strict=True):
            height, width = image.pixels.shape[:2]
            self._predicted.append((image.position, image.row.image_id, height, width))
            self._complete_image(image, result)

    def _complete_image(self, image: _Image, result: Future[Encoded] | None) -> None:
        self._settled[image.position] = (image.row.image_id, result)
        while all(self._left + row in self._settled for row in range(storage.ROW_GROUP_ROWS)):
            self._send(storage.ROW_GROUP_ROWS)

    def _send(self, rows: int) -> None:
        group = [self._settled.pop(position) for position in range(self._left, self._left + rows)]
        self._writes.append(self._writer.submit(self._write, self._left, group))
        self._left += rows

    def _write(self, first: int, group: list[tuple[str, Future[Encoded] | None]]) -> None:
        """Add a row group, when all of it is encoded."""
        rows = list[dict[str, object]]()
        for position, (image_id, result) in enumerate(group, first):
            encoded: Encoded = ()
            try:
                encoded = () if result is None else result.result()
            except Unwritable as error:
                self._unwritten.add(position)
                self._rejects.append((position, error.reject))
            rows.append(dict(zip(self._parquet.schema.names, (image_id, *encoded), strict=False)))
        self._parquet.write_table(pa.Table.from_pylist(rows, self._parquet.schema))

    def send_rest(self) -> None:
        """Once all rows are settled."""
        if self._settled:
            self._send(len(self._settled))

    def publish(self) -> FileReport:
        """The report, of the file published now or found."""
        if self.stored is not None:
            return self.stored
        with refuse_unwritable(self._task.destination):
            for write in self._writes:
                write.result()
            report = self._report()
            self._parquet.add_key_value_metadata({REPORT_KEY: report.model_dump_json(), DIGEST_KEY: self._digest})
            self._parquet.close()
            storage.write_bytes(self._uri, self._sink.getvalue())
        return report

    def _report(self) -> FileReport:
        predicted = sorted(image for image in self._predicted if image[0] not in self._unwritten)
        ids = (image_id for _, image_id, *_ in predicted if self._file.own)
        sums = [part.result() for part in self._sums]
        counts, measured = [part for part, _ in sums], [part for _, part in sums if part is not None]
        return FileReport(
            file=self._file.name,
            statistics=Statistics.of(len(predicted), len(self._rejects), counts, self._task.num_classes),
            measured=tuple(np.sum(measured, axis=0).tolist()) if measured and self._sums_measured else (),
            in_windows=self._in_windows,
            max_height=max((height for *_, height, _ in predicted), default=0),
            max_width=max((width for *_, width in predicted), default=0),
            labelled_ids=tuple(image_id for image_id in ids if image_id in self._task.used_ids),
            rejects=tuple(reject for _, reject in sorted(self._rejects, key=itemgetter(0))),
        )
