"""The unlabelled pool as one Ray Data stream: files in an order that depends on (seed, stage, pass), decoded on CPUs
anywhere in the cluster, cut to canvases, dealt out to the workers, mixed there in a buffer."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import DataContext, Dataset, ExecutionOptions, ExecutionResources

from threestage.augment.views import Extent
from threestage.config import Config, StageName
from threestage.data import storage
from threestage.data.batches import Batch
from threestage.data.datasets import pool_canvas
from threestage.data.parallel import ahead
from threestage.data.pool import PoolFile, least_agreement, load_pool, read_index
from threestage.data.samples import Decoding
from threestage.ray_backend import ray_internals
from threestage.ray_backend.pool_reader import Arrays, FilePart, FileReader
from threestage.run.stages import StageTask, images_per_step
from threestage.seeds import derive_seed
from threestage.training.checkpoint import Pointer, StreamPosition, StreamState

BLOCK_BYTES = 32 * 2**20
ABOVE_TARGET = 1.2  # blocks so much larger than their target, and less than 1.5, Ray Data passes on as they are
STREAM_BYTES = 512 * 2**20
SHUFFLE_ROWS = 256
SHUFFLE_BYTES = 256 * 2**20  # twice: of two buffers one fills while the other is used
MAX_TASKS = 1024


def unlabelled_stream(task: StageTask, begin: Pointer) -> Dataset:
    """Canvases for the rest of a stage, as one execution: starting a pass costs seconds, so passes follow each other in it.

    begin: the checkpoint that the stage continues from: the blocks that all workers had used up are left out. Rows: image
    (H,W,C), pseudo_mask (H,W), confidence (H,W) uint8; extent (4,2) float64, see Extent; image_id; number of the row in the
    stream; whether it is filled. The plan grows with the steps of the stage, not with the pool.
    """
    assert task.pool is not None
    config = task.settings()
    files = load_pool(task.pool)
    index = None if task.pseudo_masks is None else read_index(task.pseudo_masks)
    lost = min(0.5, config.data.max_bad_fraction)  # images that may vanish meanwhile
    if index is None:  # its validation images are among the rows, and passed over
        least, images = 0, [file.rows for file in files]
        lost = min(0.9, lost + len(task.split.validation) / sum(images))
    else:
        least = least_agreement(index, config.stage(task.stage).reliable_share)
        images = [entry.images_of(least) for entry in index]
    canvas, place = pool_canvas(index, config.augment), (config.seed, task.stage)
    row_bytes = canvas[0] * canvas[1] * (config.network.channels + (0 if index is None else 2))
    block_rows = rows_of_blocks(images, math.ceil(BLOCK_BYTES / row_bytes))
    needed = math.ceil(images_to_come(config, task.stage, begin.step, block_rows) / (1 - lost))
    parts = parts_from(begin, files, images, place, block_rows, needed)
    context = DataContext.get_current()
    context.target_max_block_size = int(block_rows * row_bytes / ABOVE_TARGET)
    ray_internals.throttle(context)
    items = [{"part": part.model_dump_json()} for part in parts]
    source = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_TASKS))
    reader = FileReader(
        task.pseudo_masks, storage.join(task.folder, "rejects"), place,
        Decoding(config.data.downscale, config.data.max_image_pixels, task.bands), canvas, least,
        frozenset(task.split.validation), config.name,
    )  # fmt: skip
    return source.map_batches(reader, batch_size=1)


def parts_from(
    begin: Pointer,
    files: Sequence[PoolFile],
    images: Sequence[int],
    place: tuple[int | str, ...],
    block_rows: int,
    needed: int,
) -> list[FilePart]:
    """The stream that continues from a checkpoint, with `needed` images from the place on that the foremost worker has reached.

    images: of each file in the stream.
    """
    rows = [-(-number // block_rows) * block_rows for number in images]
    first = first_row(rows, images, place, begin, block_rows)
    furthest = max([first, *(position.number for position in begin.stream or ())])
    last = furthest + math.ceil(needed * sum(rows) / sum(images))
    return [
        FilePart(
            file=files[number], pass_=pass_, first=start, rows=rows[number], images=images[number],
            block_rows=block_rows, begin=first,
        )
        for pass_, number, start in file_order(rows, place, first, last)
    ]  # fmt: skip


def images_to_come(config: Config, stage: StageName, step: int, block_rows: int) -> int:
    """What the workers take from a step to the stage's end, from the first row of their buffers to the last of those that are in
    use then: what a buffer yields depends on all of its rows."""
    steps, workers = config.stage(stage).steps - step + 4, config.cluster.most_workers
    taken = images_per_step(config, stage, workers)[1]
    return steps * taken + workers * 2 * (SHUFFLE_ROWS + block_rows)


def rows_of_blocks(images: Sequence[int], most: int) -> int:
    """The number of rows of every block, at most `most`: few blocks, and few rows to fill up. A block costs about what a 32nd of
    the largest one does.

    images: of each file; the first thousand are looked at.
    """
    some = np.array([number for number in images[:1000] if number > 0] or [1])

    def cost(size: int) -> float:
        blocks = int((-(-some // size)).sum())
        return blocks * (size + most / 32)

    return min(range(most, 0, -1), key=cost)


def first_row(
    rows: Sequence[int], images: Sequence[int], place: tuple[int | str, ...], begin: Pointer, block_rows: int
) -> int:
    """Where the stream begins for a stage that continues from a checkpoint: with the same turn of the workers as before.

    rows, images: of each file in the stream. A checkpoint of an older version says only how many images were used.
    """
    if begin.stream and begin.stream[0].block_rows == block_rows:
        return start_of_turn(begin.stream)
    if begin.unlabelled_images == 0:
        return 0
    ((pass_, file, _), *_) = file_order(images, place, begin.unlabelled_images, begin.unlabelled_images + 1)
    of_pass = file_order(rows, place, pass_ * sum(rows), (pass_ + 1) * sum(rows))
    return next(start for _, number, start in of_pass if number == file)


def start_of_turn(positions: Sequence[StreamPosition]) -> int:
    """The first row of the turn, a block for each worker, in which the worker stands that is least far."""
    block_rows, first, *_ = positions[0]
    turn = len(positions) * block_rows
    return first + (min(position.number for position in positions) - first) // turn * turn


def file_order(rows: Sequence[int], place: tuple[int | str, ...], first: int, last: int) -> list[tuple[int, int, int]]:
    """(pass, file number, its first row) from the file that holds row `first` of the stream to the one before row `last`.

    rows: of each file in the stream. Every pass is a permutation of the files that depends on (place, pass) alone.
    """
    per_file = np.asarray(rows, np.int64)
    per_pass = int(per_file.sum())
    order: list[tuple[int, int, int]] = []
    for pass_ in range(first // per_pass, math.ceil(last / per_pass)):
        permutation = np.random.default_rng(derive_seed(*place, "files", pass_)).permutation(len(per_file))
        ends = pass_ * per_pass + per_file[permutation].cumsum()
        starts = ends - per_file[permutation]
        wanted = (per_file[permutation] > 0) & (ends > first) & (starts < last)
        order += [
            (pass_, int(file), int(start)) for file, start in zip(permutation[wanted], starts[wanted], strict=True)
        ]
    return order


def stream_options(workers: int) -> ExecutionOptions:
    """At most STREAM_BYTES for each worker wait in the object store; it is then the same memory over and over, which is
    cheaper than new. Blocks keep their order, so that a run can be repeated."""
    limits = ExecutionResources(object_store_memory=workers * STREAM_BYTES)
    return ExecutionOptions(resource_limits=limits, preserve_order=True)


def begin_of(stream: StreamState | None, rank: int, workers: int) -> tuple[StreamPosition | None, list[int]]:
    """Where a worker's part continues, if there were as many workers as now, and which rows from there on groups of other sizes
    had used."""
    if stream is None:
        return None, []
    positions, used = stream
    if len(positions) == workers:
        return positions[rank], used
    numbers = np.array([position.number for position in positions])
    passed = np.arange(start_of_turn(positions), numbers.max())
    passed = passed[passed < numbers[(passed - positions[0].first) // positions[0].block_rows % len(positions)]]
    taken = [number for position in positions for number in position.taken]
    return None, sorted({*used, *passed.tolist(), *taken})


def stream_batches(
    shard: Any,
    batch_size: int,
    place: tuple[int | str, ...],
    rank: int,
    begin: StreamPosition | None = None,
    used: Sequence[int] = (),
) -> Iterator[tuple[Batch, StreamPosition]]:
    """This worker's batches, and where its part of the stream stands after each. `begin`, `used`: see `begin_of`.

    RuntimeError when the stream ends: it was made to outlast the stage.
    """
    parts = shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2)
    for rows, position in mixed(parts, batch_size, place, rank, begin, used):
        batch = Batch(
            torch.from_numpy(rows["image"]).permute(0, 3, 1, 2),
            Extent.of(torch.from_numpy(rows["extent"])),
            {name: torch.from_numpy(rows[name]) for name in ("pseudo_mask", "confidence") if name in rows},
            tuple(map(str, rows["image_id"])),
        )
        yield batch, position
    raise RuntimeError(f"the stream of unlabelled images ended early for worker {rank}: are the pool's files readable?")


def mixed(
    parts: Iterable[Arrays],
    batch_size: int,
    place: tuple[int | str, ...],
    rank: int,
    begin: StreamPosition | None = None,
    used: Sequence[int] = (),
) -> Iterator[tuple[Arrays, StreamPosition]]:
    """Batches drawn at random, without replacement, from one buffer after the other, while the next one fills in a thread.

    parts: blocks of rows. What a buffer holds, and its order, depends on `place` and its first row alone. The last rows, less
    than a batch, are dropped.
    """
    blocks = iter(parts)
    head = next(blocks, None)
    if head is None:
        return
    block_rows = len(head["number"])
    first = int(head["number"][0]) - rank * block_rows
    least = first if begin is None else begin.number
    if least < first:
        raise RuntimeError(f"the stream begins with row {first}, after row {least}: it was made for a later checkpoint")
    for buffer in ahead(buffers(chain([head], blocks), batch_size, least, np.array(used, np.int64))):
        number = int(buffer["number"][0])
        order = np.random.default_rng(derive_seed(*place, number)).permutation(len(buffer["number"]))
        start = len(begin.taken) if begin is not None and number == begin.number else 0
        for end in range(start + batch_size, len(order) + 1, batch_size):
            rows = order[end - batch_size : end]
            position = StreamPosition(block_rows, first, number, tuple(buffer["number"][order[:end]].tolist()))
            yield {name: values[rows] for name, values in buffer.items()}, position


def buffers(blocks: Iterable[Arrays], batch_size: int, least: int, used: np.ndarray) -> Iterator[Arrays]:
    """The filled rows from number `least` on that are not `used`, SHUFFLE_ROWS at a time, or SHUFFLE_BYTES, in whole batches.

    A buffer is this process's own memory: blocks of the object store are let go as soon as they are copied into it.
    """
    buffer, held = Arrays(), 0
    for block in blocks:
        rows = np.flatnonzero(block["filled"] & (block["number"] >= least) & ~np.isin(block["number"], used))
        while len(rows):
            buffer = buffer or _room_for(block, batch_size)
            taken, rows = np.split(rows, [len(buffer["number"]) - held])
            for name, values in buffer.items():
                values[held : held + len(taken)] = block[name][taken]
            held += len(taken)
            if held == len(buffer["number"]):
                yield buffer
                buffer, held = Arrays(), 0
    if held:
        yield {name: values[:held] for name, values in buffer.items()}


def _room_for(block: Arrays, batch_size: int) -> Arrays:
    row_bytes = sum(values.nbytes for values in block.values()) // len(block["number"])
    rows = max(batch_size, min(SHUFFLE_ROWS, SHUFFLE_BYTES // row_bytes) // batch_size * batch_size)
    return {
        name: np.empty((rows, *values.shape[1:]), object if name == "image_id" else values.dtype)
        for name, values in block.items()
    }
