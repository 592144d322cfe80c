"""The base class of every settings model; each lives beside the code that it configures."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen, and refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)
