"""The unlabelled pool as one Ray Data stream: files in an order that depends on (seed, stage, pass), decoded on CPUs
anywhere in the cluster, cut to canvases, dealt out to the workers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray.data
import torch
from ray.data import Dataset

from threestage.config import Config
from threestage.data.batches import Batch, canvas_size, decode_sample, place
from threestage.data.records import DataFile, load_manifest, pool_files
from threestage.data.sets import pool_file_samples
from threestage.pseudo_masks import pseudo_mask_uri, stored_statistics
from threestage.seeds import derive_seed
from threestage.stages import StageTask

ROWS_PER_BLOCK = 64
SHUFFLE_ROWS = 256


def unlabelled_stream(task: StageTask, first_step: int) -> Dataset:
    """Canvases for the rest of a stage, as one execution: starting a pass costs seconds, so passes follow each other in it.

    Rows: image (H,W,3), pseudo_mask (H,W), confidence (H,W) uint8; size (2,) int64; image_id. A resumed stage leaves out
    the files that its pass had consumed.
    """
    config = task.settings()
    manifest = load_manifest(config.data.root, task.manifest_version)
    files = pool_files(manifest)
    per_step = config.stage(task.stage).unlabelled_batch * config.cluster.workers
    rows = pool_rows(files, task.pseudo_masks)
    needed = (config.stage(task.stage).steps + 1) * per_step
    order = file_order(files, rows, (config.seed, task.stage), first_step * per_step, needed)
    read = _FileReader(task, config, canvas_size(manifest, config.augment, config.data.downscale))
    items = [{"pass": pass_, "file": file.model_dump_json()} for pass_, file in order]
    return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(read, batch_size=1)


def pool_rows(files: Sequence[DataFile], pseudo_masks: str | None) -> list[int]:
    """Images of each file that have a pseudo-mask: validation images and unreadable ones are not in the stream."""
    assert pseudo_masks is not None
    found = [stored_statistics(pseudo_mask_uri(pseudo_masks, file)) for file in files]
    return [0 if statistics is None else statistics.images for statistics in found]


def file_order(
    files: Sequence[DataFile], rows: Sequence[int], place: tuple[int | str, ...], consumed: int, needed: int
) -> list[tuple[int, DataFile]]:
    """(pass, file) from the file that holds image number `consumed` until `needed` images and one pass more are reached.

    rows: images of each file in the stream. Every pass is a permutation of the files that depends on (place, pass) alone.
    """
    per_pass = sum(rows)
    order: list[tuple[int, DataFile]] = []
    position = (consumed // per_pass) * per_pass
    for pass_ in range(consumed // per_pass, math.ceil(needed / per_pass) + 1):
        rng = np.random.default_rng(derive_seed(*place, "files", pass_))
        for index in rng.permutation(len(files)):
            position += rows[index]
            if position > consumed and rows[index]:
                order.append((pass_, files[index]))
    return order


class _FileReader:
    """Reads one image file with its pseudo-mask file, in an order of its own for every pass."""

    def __init__(self, task: StageTask, config: Config, canvas: tuple[int, int]) -> None:
        assert task.pseudo_masks is not None
        self._pseudo_masks = task.pseudo_masks
        self._place = (config.seed, task.stage)
        self._root = config.data.root
        self._downscale = config.data.downscale
        self._canvas = canvas

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        pass_, file = int(batch["pass"][0]), DataFile.model_validate_json(str(batch["file"][0]))
        samples = list(pool_file_samples(self._root, file, self._pseudo_masks))
        rng = np.random.default_rng(derive_seed(*self._place, "rows", pass_, file.digest))
        order = rng.permutation(len(samples))
        for start in range(0, len(order), ROWS_PER_BLOCK):
            chosen = [samples[i] for i in order[start : start + ROWS_PER_BLOCK]]
            placed = [place(decode_sample(sample, self._downscale), self._canvas, rng) for sample in chosen]
            yield {
                "image": np.stack([image for image, _, _ in placed]),
                "pseudo_mask": np.stack([maps["pseudo_mask"] for _, maps, _ in placed]),
                "confidence": np.stack([maps["confidence"] for _, maps, _ in placed]),
                "size": np.array([size for _, _, size in placed], np.int64),
                "image_id": np.array([sample.image_id for sample in chosen]),
            }


def stream_batches(shard: Any, batch_size: int, seed: int, rank: int) -> Iterator[Batch]:
    """This worker's batches. RuntimeError when the stream ends: it was made to outlast the stage."""
    for rows in shard.iter_batches(
        batch_size=batch_size,
        batch_format="numpy",
        prefetch_batches=4,
        drop_last=True,
        local_shuffle_buffer_size=SHUFFLE_ROWS,
        local_shuffle_seed=derive_seed(seed, "buffer", rank) % 2**32,
    ):
        yield Batch(
            torch.from_numpy(np.array(rows["image"])).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(np.array(rows["size"])),
            {name: torch.from_numpy(np.array(rows[name])) for name in ("pseudo_mask", "confidence")},
            tuple(map(str, rows["image_id"])),
        )
    raise RuntimeError(f"the stream of unlabelled images ended early for worker {rank}: are the pool's files readable?")
