"""The version of a model that answers now. Where an alias names it, a newer one takes its place while requests are answered."""

import re
import threading
from collections.abc import Sequence
from functools import partial

import numpy as np

from threestage.data import storage
from threestage.data.bands import Bands
from threestage.errors import InputError, Warn, reason_of
from threestage.mlflow_sync.client import open_models
from threestage.mlflow_sync.records import RegistrySettings
from threestage.prediction.image_model import Model, Prediction
from threestage.prediction.predict import read_model

ALIAS = re.compile(r"models:/[^/@]+@[^/@]+")
EXAMPLE_SIZE = (256, 320, 3)
AWAY = "mlflow/"
"""What the codes of errors begin with that a later look may not meet."""

Answered = tuple[str, Prediction]
"""Which version has answered, and what."""


def model_uri(text: str) -> str:
    """A model as the command line names it: NAME@champion is short for models:/NAME@champion."""
    return f"models:/{text}" if ALIAS.fullmatch(f"models:/{text}") and not storage.exists(text) else text


def current_version(model: str, registry: RegistrySettings) -> str:
    """The version that an alias names now, as models:/NAME/3; any other model is its own version."""
    return open_models(registry).pinned(model) if ALIAS.fullmatch(model) else model


def tested_model(version: str, registry: RegistrySettings, size: tuple[int, ...]) -> Model:
    """A model, warmed by an image of this height and width. InputError where there is none, or it predicts no probabilities."""
    model = Model.of(read_model(version, registry), version)
    slope = np.linspace(0, 255, size[1], dtype=np.uint8)[None, :, None]
    image = np.broadcast_to(slope, (*size[:2], model.card.network.channels)).copy()
    found = model.predict_batch([image])[0]
    least, most = float(found.confidence.min()), float(found.confidence.max())
    if not (0 < least <= most <= 1.001 and found.class_ids.max() < len(model.card.classes)):
        raise InputError(
            f"{version}: its smoke test failed, its confidence lies between {least:g} and {most:g}; register a sound version",
            "serve/smoke-test",
        )
    return model


class FollowedModel:
    """`model`: a folder, a version or an alias; `version`: what to begin with. Raises InputError where there is none.

    A new version is loaded and tested beside the old one, which answers until then, and stays where the new one fails.
    """

    def __init__(self, model: str, registry: RegistrySettings, version: str, warn: Warn) -> None:
        self._model, self._registry, self._warn = model, registry, warn
        self._size: tuple[int, ...] = EXAMPLE_SIZE
        self._current = version, tested_model(version, registry, self._size)
        self._refused: str | None = None
        self._warned = ""
        self._ended = threading.Event()

    @property
    def version(self) -> str:
        return self._current[0]

    @property
    def bands(self) -> Bands | None:
        """What the version takes images to have."""
        return self._current[1].card.bands

    def predict_batch(self, images: Sequence[np.ndarray]) -> list[Answered]:
        """Of images of one size, by one version."""
        version, model = self._current
        found = model.predict_batch(images)
        self._size = images[0].shape
        return [(version, prediction) for prediction in found]

    def check(self) -> None:
        """Let the version take over that the alias names now. A version that failed is not tried again; a store that does not
        answer is."""
        newest = "the registry"
        try:
            newest = current_version(self._model, self._registry)
            if newest not in (self.version, self._refused):
                self._current = newest, tested_model(newest, self._registry, self._size)
                self._warn(f"{newest} answers from now on")
            self._warned = ""
        except Exception as error:  # whatever it is, the old version answers
            if not (isinstance(error, InputError) and str(error.code).startswith(AWAY)):
                self._refused = newest
            self._warn_once(f"{newest} cannot be used ({reason_of(error)}): {self.version} keeps answering")

    def _warn_once(self, text: str) -> None:
        if text != self._warned:
            self._warned = text
            self._warn(text)

    def follow(self, every_s: float) -> None:
        """`check` in a thread until `close`, where an alias names the model."""
        if ALIAS.fullmatch(self._model):
            threading.Thread(target=partial(self._follow, every_s), name="follow", daemon=True).start()

    def _follow(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            self.check()

    def close(self) -> None:
        self._ended.set()
