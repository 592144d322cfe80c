"""A model in this process that answers images: what `serve --local` has, and each replica on a cluster."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from threestage.errors import Warn
from threestage.mlflow_sync.records import RegistrySettings
from threestage.serving.answer import Answer, Form, answer_image
from threestage.serving.batcher import Batcher
from threestage.serving.followed_model import Answered, FollowedModel
from threestage.serving.settings import ServeSettings


class ImageAnswers:
    """Raises InputError where there is no such model. `version`: what to begin with."""

    def __init__(
        self, model: str, registry: RegistrySettings, version: str, settings: ServeSettings, warn: Warn
    ) -> None:
        self.followed = FollowedModel(model, registry, version, warn)
        self._batcher = Batcher(self.followed.predict_batch)
        self._threads = ThreadPoolExecutor(settings.most_requests, "answer")
        self.followed.follow(settings.follow_every_s)

    async def answer(self, data: bytes, form: Form) -> Answer:
        """Of an image's bytes; a thread decodes it, waits for its prediction and encodes that."""
        loop = asyncio.get_running_loop()
        bands = self.followed.bands
        return await loop.run_in_executor(self._threads, answer_image, data, form, self._predict, bands)

    def _predict(self, image: np.ndarray) -> Answered:
        return self._batcher.submit(image).result()
