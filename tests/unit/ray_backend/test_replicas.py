"""Why: a replica that dies may cost time, but no request; what fails twice is an error."""

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from threestage.serving.answer import Answer

pytest.importorskip("grpc_reflection", reason="the extra serve is not installed")

pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


class Handle:
    """Stands for that of a deployment: raises or returns what it was given."""

    def __init__(self, *outcomes: Answer | Exception) -> None:
        self._outcomes = list(outcomes)
        self.answer = self

    async def remote(self, data: bytes, form: str) -> Answer:
        outcome = self._outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


DONE = Answer(200, "image/png", b"mask", "models:/shapes/2")


def asked(*outcomes: Answer | Exception) -> tuple[Answer, str]:
    from threestage.ray_backend.replicas import RetryingHandle

    handle: Any = Handle(*outcomes)
    retrying = RetryingHandle(handle, "models:/shapes/1")
    return asyncio.run(retrying.answer(b"image", "mask")), retrying.version


def test_a_request_whose_replica_died_is_sent_once_more() -> None:
    assert asked(DONE) == (DONE, "models:/shapes/2")
    assert asked(ActorDiedError(), DONE) == (DONE, "models:/shapes/2")
    with pytest.raises(ActorDiedError):
        asked(ActorDiedError(), ActorDiedError())
    with pytest.raises(RuntimeError, match="of the model"):
        asked(RuntimeError("of the model"), DONE)


def test_a_refusal_names_no_version() -> None:
    assert asked(Answer(415, "application/json", b"{}"))[1] == "models:/shapes/1"
