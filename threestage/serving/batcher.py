"""Images of many threads, predicted by one: what waits while it works is its next batch."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

import numpy as np

from threestage.evaluation import BATCH

BATCH_PIXELS = 2**22
"""Of the images of a batch, where it is more than one: nobody waits for many large ones, nor do they fill the memory."""

Result = TypeVar("Result")


class Batcher(Generic[Result]):
    """`predict`: images (H,W,3) of one size → a result for each. No image waits for others to come."""

    def __init__(self, predict: Callable[[Sequence[np.ndarray]], Sequence[Result]], batch_size: int = BATCH) -> None:
        self._predict, self._batch_size = predict, batch_size
        self._asked: SimpleQueue[tuple[np.ndarray, Future[Result]]] = SimpleQueue()
        threading.Thread(target=self._run, name="batcher", daemon=True).start()

    def submit(self, image: np.ndarray) -> Future[Result]:
        """The result to come, or what the prediction of this image raises."""
        future: Future[Result] = Future()
        self._asked.put((image, future))
        return future

    def _run(self) -> None:
        waiting: list[tuple[np.ndarray, Future[Result]]] = []
        while True:
            if not waiting:
                waiting.append(self._asked.get())
            while not self._asked.empty():
                waiting.append(self._asked.get())
            size = waiting[0][0].shape  # of the one that waits longest
            most = max(1, min(self._batch_size, BATCH_PIXELS // (size[0] * size[1])))
            batch = [entry for entry in waiting if entry[0].shape == size][:most]
            taken = {id(future) for _, future in batch}
            waiting = [entry for entry in waiting if id(entry[1]) not in taken]
            self._settle(batch)

    def _settle(self, batch: list[tuple[np.ndarray, Future[Result]]]) -> None:
        """A batch that fails is tried image by image: it may be too large for the memory."""
        try:
            results = self._predict([image for image, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for entry in batch:
                    self._settle([entry])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
