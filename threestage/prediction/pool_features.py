"""What `threestage next` chooses by, a row for each image of the pool: how unsure the model is of it, which classes it sees
there, and where the image lies among the others (pooled features of the encoder).

Distances survive a random projection to FEATURE_SIZE numbers, which the same seed makes everywhere (Johnson and
Lindenstrauss): 256 bytes for an image, whatever the encoder.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from threestage.data.pool import PoolRow
from threestage.prediction.prediction_writer import Encoded, Measured, PredictionWriter

FEATURE_SIZE = 128
PROJECTION_SEED = 0
MARGIN_PIXELS = 2**16
"""Of an image, on which its margin is measured; evenly spaced."""


def feature_schema(num_classes: int) -> pa.Schema:
    """`class_shares`: (C,) float32, of the image's pixels. `entropy`: mean over the pixels, 1 = every class is as likely.
    `margin`: mean of the first probability less the second. `feature`: (FEATURE_SIZE,) float16, of length near 1."""
    return pa.schema(
        [
            ("image_id", pa.string()),
            ("source", pa.string()),
            ("class_shares", pa.binary(4 * num_classes)),
            ("entropy", pa.float32()),
            ("margin", pa.float32()),
            ("feature", pa.binary(2 * FEATURE_SIZE)),
        ]
    )


class PoolFeatures(PredictionWriter):
    """Writes no masks, but rows of `feature_schema`. Of an image that is cut into windows, the mean over its windows."""

    def __init__(self, num_classes: int) -> None:
        self.schema = feature_schema(num_classes)
        self._num_classes = num_classes

    def encode(self, row: PoolRow, pixels: np.ndarray, class_ids: np.ndarray, confidence: np.ndarray) -> Encoded:
        counts = np.bincount(class_ids.ravel(), minlength=self._num_classes)[: self._num_classes]
        return row.source, (counts / max(1, counts.sum())).astype(np.float32).tobytes()

    @contextlib.contextmanager
    def measure(self, network: nn.Module) -> Iterator[Measured]:
        def values(pooled: Tensor, logits: Tensor) -> Tensor:
            return torch.cat([mean_margin(logits)[:, None], pooled], 1)

        with forward_means(network, values) as means:

            def measured(entropy: Tensor) -> Tensor:
                margin, pooled = means(len(entropy)).tensor_split([1], dim=1)
                unsure = entropy.mean((1, 2)) / math.log(max(2, self._num_classes))
                return torch.cat([unsure[:, None], margin, projected(pooled)], dim=1)

            yield measured

    def measured_columns(self, values: np.ndarray) -> Encoded:
        return float(values[0]), float(values[1]), values[2:].astype(np.float16).tobytes()


class NothingMeasured(Exception):
    """Raised by what `forward_means` gives, where the network was not asked."""


@contextlib.contextmanager
def forward_means(network: Any, values: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Callable[[int], Tensor]]:
    """Asks `values` of each forward pass of this thread: pooled last map of the encoder (N,D), logits (N,C,H,W) → (N,K).

    Gives a function: of how many images were just predicted → (images,K), the mean over the passes of each, which were of windows
    or views. All images had as many passes, those of some images after those of others.
    """
    passes, pooled, thread = list[Tensor](), list[Tensor](), threading.get_ident()

    def pool(module: nn.Module, inputs: Any, maps: Any) -> None:
        if threading.get_ident() == thread:
            last = maps[-1] if isinstance(maps, tuple) else maps
            pooled[:] = [last.float().mean((2, 3))]

    def keep(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if threading.get_ident() == thread:
            passes.append(values(pooled[0], outputs[0]))

    def means(images: int) -> Tensor:
        if not passes:
            raise NothingMeasured
        each = sum(map(len, passes)) // images
        groups = (passes[start : start + each] for start in range(0, len(passes), each))
        return torch.cat([torch.stack(group).mean(0) for group in groups])

    hooks = network.encoder.last.register_forward_hook(pool), network.register_forward_hook(keep)
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


def mean_margin(logits: Tensor) -> Tensor:
    """Logits (N,C,H,W) → (N,): mean over the pixels of the highest probability less the second."""
    if logits.shape[1] < 2:
        return torch.ones(len(logits), device=logits.device)
    step = max(1, math.isqrt(logits.shape[2] * logits.shape[3] // MARGIN_PIXELS))
    first, second = logits[..., ::step, ::step].float().softmax(1).topk(2, 1).values.unbind(1)
    return (first - second).mean((1, 2))


def projected(pooled: Tensor) -> Tensor:
    """Pooled features (N,D), brought to length 1, as (N,FEATURE_SIZE)."""
    return F.normalize(pooled) @ _projection(pooled.shape[1], pooled.device)


@lru_cache(maxsize=4)
def _projection(channels: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(PROJECTION_SEED)
    return (torch.randn(channels, FEATURE_SIZE, generator=generator) / math.sqrt(FEATURE_SIZE)).to(device)
