"""Where a model comes from, as plain JSON: enough to walk from it to its data, its pseudo-masks and its teacher, and back."""

from collections.abc import Mapping
from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from threestage.settings import Settings


class DataSet(Settings):
    """`digest` covers classes, ids, images and masks."""

    root: str
    name: str
    version: int
    digest: str


class Images(Settings):
    """Images that a run took from the data set; `digest` covers their ids, their images and their masks."""

    name: str
    images: int
    digest: str


class PseudoMaskSet(Settings):
    """`digest`: of the model and the files that it was asked about. `statistics`: see pseudo_masks.Statistics.summary."""

    uri: str
    digest: str
    images: int
    rejected: int
    statistics: Mapping[str, float]


class Teacher(Settings):
    """The model that made the pseudo-masks which a stage learnt from."""

    stage: str
    model_digest: str
    model: str


class ContinuedFrom(Settings):
    """The model that stage 1 of a later round starts from: the champion of another run."""

    run: str
    stage: str
    model_digest: str
    model: str


AT_SIZE = " at 1/"
"""In the name of validation images, before the size that they were reduced to."""


class Lineage(Settings):
    """Of one stage's model. Stage 1 has no teacher and learns from no pseudo-masks; `made` is what the model says of the
    pool, where it was asked. `continued_from`: of every stage of a run that continues another."""

    run: str
    stage: str
    model_digest: str
    code_version: str
    data: DataSet
    labelled: Images
    validation: Images
    split_seed: int
    teacher: Teacher | None
    learnt_from: PseudoMaskSet | None
    confidence_threshold: float | None
    made: PseudoMaskSet | None
    continued_from: ContinuedFrom | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Runs that continue no other are recorded as they always were."""
        tree: dict[str, Any] = serialise(self)
        return tree if self.continued_from is not None else {k: v for k, v in tree.items() if k != "continued_from"}


def short_digest(digest: str) -> str:
    """As people read it."""
    return digest[:12]
