"""Random masks that are hard to keep: holes, lines of one pixel, parts at the border, many parts, single pixels."""

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def random_mask(rng: np.random.Generator, size: tuple[int, int], classes: int) -> Bytes:
    """uint8 (H,W) class ids below `classes`, some pixels 255."""
    height, width = size
    mask = np.full((height, width), rng.integers(classes), np.uint8)
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    for _ in range(rng.integers(2, 12)):
        class_id = 255 if rng.random() < 0.1 else rng.integers(classes)
        y, x, radius = rng.integers(height), rng.integers(width), rng.integers(1, max(2, min(height, width) // 2))
        distance = np.hypot(rows - y, columns - x)
        kind = rng.integers(5)
        if kind == 0:
            mask[distance <= radius] = class_id
        elif kind == 1:  # a ring: a hole in it
            mask[(distance <= radius) & (distance >= radius * 0.6)] = class_id
        elif kind == 2:  # lines of one pixel
            mask[y], mask[:, x] = class_id, rng.integers(classes)
        elif kind == 3:  # many parts, that touch at corners too
            mask[rng.random((height, width)) < 0.05] = class_id
        else:
            mask[y:, : x + 1] = class_id
    return mask


def random_size(rng: np.random.Generator, most: int) -> tuple[int, int]:
    height, width = rng.integers(1, most, 2).tolist()
    return height, width
