"""Why: a busy server must predict what waits together, and one bad image may not cost the others."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from threestage.serving.batcher import Batcher


def test_what_waits_is_predicted_together_by_size_and_a_failure_is_of_one_image() -> None:
    begun, free = threading.Event(), threading.Event()
    batches: list[list[int]] = []

    def predict(images: Sequence[np.ndarray]) -> list[int]:
        assert len({image.shape for image in images}) == 1
        batches.append([int(image.flat[0]) for image in images])
        begun.set()
        assert free.wait(10)
        if 13 in batches[-1]:
            raise RuntimeError("unlucky")
        return batches[-1]

    batcher = Batcher(predict, batch_size=3)
    numbers = [0, 1, 2, 13, 4, 5]
    images = [np.full((2, 9 if number == 5 else 4, 3), number, np.uint8) for number in numbers]
    first = batcher.submit(images[0])
    assert begun.wait(10)
    others = [batcher.submit(image) for image in images[1:]]
    free.set()
    assert first.result(10) == 0
    for number, future in zip(numbers[1:], others, strict=True):
        if number == 13:
            with pytest.raises(RuntimeError, match="unlucky"):
                future.result(10)
        else:
            assert future.result(10) == number
    assert batches == [[0], [1, 2, 13], [1], [2], [13], [4], [5]]
