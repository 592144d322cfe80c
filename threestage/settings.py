"""The base class of every settings model; each lives beside the code that it configures."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr

from threestage.errors import CodedError


class Settings(BaseModel):
    """Frozen, and refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _host_from: str | None = PrivateAttr(None)

    @property
    def host_from(self) -> str | None:
        """The file that named the host of these settings; None if the user named it otherwise. See hosts.py."""
        return self._host_from

    def with_host_from(self, file: str | None) -> Self:
        """The same settings; their host was named by `file`."""
        copy = self.model_copy()
        copy._host_from = file
        return copy


def raised_by(problem: Mapping[str, Any]) -> CodedError | None:
    """The error of ours that a validator raised, from one of pydantic's `errors()`."""
    error = problem.get("ctx", {}).get("error")
    return error if isinstance(error, CodedError) else None
