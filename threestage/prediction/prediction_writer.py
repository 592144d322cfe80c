"""What becomes of images once they are predicted: pseudo-masks; others derive from `PredictionWriter`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from torch import Tensor, nn

from threestage.data.pool import PSEUDO_MASK_SCHEMA, PoolFile, PoolRow, pseudo_mask_uri, read_pool_rows
from threestage.data.records import encode_mask
from threestage.data.rejects import Reject
from threestage.prediction.pseudo_masks import PoolTask, class_confidence_entropy
from threestage.prediction.tta import TTASettings, window_logits

Encoded = tuple[bytes | str | int | float | None, ...]  # a row's columns after its id
Measured = Callable[[Tensor], Tensor | None]
"""Entropy (N,H,W) of the images that were just predicted → what else was measured of each, (N,K) float32 on their device."""


class Unwritable(Exception):
    """Raised by `PredictionWriter.encode`: the prediction of one image cannot be written, and others can."""

    def __init__(self, row: PoolRow, reason: str) -> None:
        super().__init__(reason)
        self.reject = Reject(image_id=row.image_id, source=row.source, reason=reason)


class PredictionWriter:
    """What becomes of images once they are predicted. This one: pseudo-masks; others derive from it."""

    schema = PSEUDO_MASK_SCHEMA
    protocol = TTASettings()
    precision = "auto"
    other: nn.Module | None = None
    """A network with whose predictions these are compared: the last column of the schema."""
    sums_measured = False
    """Whether the report of a file has the sum of what was measured of its images."""
    writers = 0
    """Threads that encode, where that waits for a store; 0: those that decode."""

    def rows(self, file: PoolFile) -> Iterator[list[PoolRow]]:
        """The rows of a file in their order, in chunks."""
        return read_pool_rows(file)

    def uri(self, task: PoolTask, file: PoolFile) -> str:
        """Of the Parquet file of `schema` that is written when all of a file's rows are encoded."""
        return pseudo_mask_uri(task.destination, file)

    def predict(self, network: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N,3,H,W) uint8 → class, confidence, entropy, as `pseudo_masks.predict` gives them of whole images."""
        return class_confidence_entropy(window_logits(network, pixels.float() / 255, self.protocol))

    def encode(self, row: PoolRow, pixels: np.ndarray, class_ids: np.ndarray, confidence: np.ndarray) -> Encoded:
        """Called in a thread: pixels (H,W,3), class ids and confidence (H,W), uint8 each, the size predicted. Raises Unwritable
        where that costs the image only."""
        return encode_mask(class_ids, fast=True), confidence.tobytes()

    def measure(self, network: nn.Module) -> AbstractContextManager[Measured]:
        """Watches the forward passes of one batch."""
        return nullcontext(lambda entropy: None)

    def measured_columns(self, values: np.ndarray) -> Encoded:
        """The columns after those of `encode`, from what was measured of an image (K,)."""
        return ()
