"""The unlabelled pool as one Ray Data stream: files in an order that depends on (seed, stage, pass), decoded on CPUs
anywhere in the cluster, cut to canvases, dealt out to the workers, mixed there in a buffer."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import DataContext, Dataset, ExecutionOptions, ExecutionResources

from threestage.augment.views import Extent
from threestage.data import storage
from threestage.data.batches import Batch, share_of
from threestage.data.datasets import pool_canvas
from threestage.data.pool import least_agreement, load_pool, read_index
from threestage.ray_backend import ray_internals
from threestage.ray_backend.pool_reader import BLOCK_BYTES, Arrays, FileReader
from threestage.run.stages import StageTask
from threestage.seeds import derive_seed
from threestage.training.checkpoint import Pointer

STREAM_BYTES = 512 * 2**20
SHUFFLE_ROWS = 256
SHUFFLE_BYTES = 512 * 2**20
MAX_TASKS = 1024


def unlabelled_stream(task: StageTask, begin: Pointer) -> Dataset:
    """Canvases for the rest of a stage, as one execution: starting a pass costs seconds, so passes follow each other in it.

    begin: the checkpoint that the stage goes on from: the files that its pass had consumed are left out; those that were
    being read then may come again or be missed. Rows: image (H,W,3), pseudo_mask (H,W), confidence (H,W) uint8; extent (4,2)
    float64, see Extent; image_id. The plan grows with the steps of the stage, not with the pool.
    """
    assert task.pool is not None
    config = task.settings()
    files = load_pool(task.pool)
    index = None if task.pseudo_masks is None else read_index(task.pseudo_masks)
    stage, workers = config.stage(task.stage), config.cluster.most_workers
    per_step = (
        share_of(stage.unlabelled_batch, config.training.batch_scope, 0, workers).total + workers
    )  # shares rounded up
    lost = min(0.5, config.data.max_bad_fraction)  # images that may vanish meanwhile; the rest of a batch per worker
    if index is None:  # its validation images are among the rows, and passed over
        least, rows = 0, [file.rows for file in files]
        lost = min(0.9, lost + len(task.split.validation) / sum(rows))
    else:
        least = least_agreement(index, stage.reliable_share)
        rows = [entry.images_of(least) for entry in index]
    needed = begin.unlabelled_images + math.ceil((stage.steps - begin.step + 4) * per_step / (1 - lost))
    order = file_order(rows, (config.seed, task.stage), begin.unlabelled_images, needed)
    items = [{"pass": pass_, "file": files[number].model_dump_json()} for pass_, number in order]
    context = DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    ray_internals.throttle(context)
    source = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_TASKS))
    reader = FileReader(
        task.pseudo_masks, storage.join(task.folder, "rejects"), (config.seed, task.stage), config.data,
        pool_canvas(index, config.augment), least, frozenset(task.split.validation),
    )  # fmt: skip
    return source.map_batches(reader, batch_size=1)


def file_order(rows: Sequence[int], place: tuple[int | str, ...], consumed: int, needed: int) -> list[tuple[int, int]]:
    """(pass, file number) from the file that holds image number `consumed` to the one that holds number `needed`.

    rows: images of each file in the stream. Every pass is a permutation of the files that depends on (place, pass) alone.
    """
    per_file = np.asarray(rows, np.int64)
    per_pass = int(per_file.sum())
    order: list[tuple[int, int]] = []
    first = consumed // per_pass
    for pass_ in range(first, math.ceil(needed / per_pass)):
        permutation = np.random.default_rng(derive_seed(*place, "files", pass_)).permutation(len(per_file))
        ends = pass_ * per_pass + per_file[permutation].cumsum()
        starts = ends - per_file[permutation]
        wanted = (per_file[permutation] > 0) & (ends > consumed) & (starts < needed)
        order += [(pass_, int(number)) for number in permutation[wanted]]
    return order


def stream_options(workers: int) -> ExecutionOptions:
    """At most STREAM_BYTES for each worker wait in the object store; it is then the same memory over and over, which is
    cheaper than new. Blocks keep their order, so that a run can be repeated."""
    limits = ExecutionResources(object_store_memory=workers * STREAM_BYTES)
    return ExecutionOptions(resource_limits=limits, preserve_order=True)


def stream_batches(shard: Any, batch_size: int, seed: int, rank: int) -> Iterator[Batch]:
    """This worker's batches. RuntimeError when the stream ends: it was made to outlast the stage."""
    rng = np.random.default_rng(derive_seed(seed, "buffer", rank))
    for rows in mixed(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2), batch_size, rng):
        yield Batch(
            torch.from_numpy(rows["image"]).permute(0, 3, 1, 2),
            Extent.of(torch.from_numpy(rows["extent"])),
            {name: torch.from_numpy(rows[name]) for name in ("pseudo_mask", "confidence") if name in rows},
            tuple(map(str, rows["image_id"])),
        )
    raise RuntimeError(f"the stream of unlabelled images ended early for worker {rank}: are the pool's files readable?")


def mixed(parts: Iterable[Mapping[str, np.ndarray]], batch_size: int, rng: np.random.Generator) -> Iterator[Arrays]:
    """Batches drawn at random from a buffer of SHUFFLE_ROWS rows (fewer where they exceed SHUFFLE_BYTES).

    The buffer is this function's own memory: blocks of the object store are let go as soon as they are copied into it.
    The last rows, less than a batch, are dropped.
    """
    buffer: Arrays = {}
    free: list[int] = []  # rows of the buffer to fill next
    for part in parts:
        if not buffer:
            buffer = _room_for(part, batch_size)
            free = list(range(len(buffer["image"])))
        for row in range(len(part["image"])):
            place = free.pop()
            for name, values in buffer.items():
                values[place] = part[name][row]
            if not free:
                free = rng.choice(len(buffer["image"]), batch_size, replace=False).tolist()
                yield {name: values[free] for name, values in buffer.items()}
    rest = rng.permutation(np.setdiff1d(np.arange(len(buffer["image"])), free)) if buffer else np.empty(0, np.int64)
    for start in range(0, len(rest) - batch_size + 1, batch_size):
        yield {name: values[rest[start : start + batch_size]] for name, values in buffer.items()}


def _room_for(part: Mapping[str, np.ndarray], batch_size: int) -> Arrays:
    row_bytes = sum(values.nbytes for values in part.values()) // len(part["image"])
    rows = max(batch_size, min(SHUFFLE_ROWS, SHUFFLE_BYTES // row_bytes))
    return {
        name: np.empty((rows, *values.shape[1:]), object if name == "image_id" else values.dtype)
        for name, values in part.items()
    }
