"""The base class of every settings model; each lives beside the code that it configures."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr

from threestage.errors import CodedError, InputError, RenamedSetting


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


def current_key(key: str, renamed: Mapping[str, str]) -> str:
    """A dotted key, or one below it, under its present name. `renamed`: old dotted key → new one."""
    for old, new in renamed.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def with_current_names(tree: Mapping[str, Any], renamed: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """A tree of settings with its keys under their present names, and the old keys that it had.

    Raises InputError where a key is there under both names.
    """
    found, old_keys = dict(tree), []
    for old, new in renamed.items():
        section, _, name = old.rpartition(".")
        inner = found.get(section) if section else found
        if not isinstance(inner, Mapping) or name not in inner:
            continue
        new_name = new.rpartition(".")[2]
        if new_name in inner:
            raise InputError(
                f"{old}={inner[name]!r}: is called {new} now, which is set too; drop one", "config/conflict"
            )
        values = {new_name if key == name else key: value for key, value in inner.items()}
        found = {**found, section: values} if section else values
        old_keys.append(old)
    return found, old_keys


def warn_of_old_names(old_keys: Sequence[str], renamed: Mapping[str, str]) -> None:
    """One warning of settings that were given under older names."""
    if old_keys:
        names = ", ".join(f"{renamed[key]} in place of {key}" for key in old_keys)
        warnings.warn(f"settings have new names: write {names}; the old ones still work", RenamedSetting, stacklevel=4)


def raised_by(problem: Mapping[str, Any]) -> CodedError | None:
    """The error of ours that a validator raised, from one of pydantic's `errors()`."""
    error = problem.get("ctx", {}).get("error")
    return error if isinstance(error, CodedError) else None
