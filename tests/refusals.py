"""What a test expects of an error that a user meets: its code and the values that it names, not its wording."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from threestage.errors import CodedError, InputError


@contextmanager
def refused(
    code: str, *named: object, error: type[CodedError] = InputError
) -> Iterator[pytest.ExceptionInfo[CodedError]]:
    """The block raises `error` with this code, and its line names each of `named`."""
    with pytest.raises(error) as caught:
        yield caught
    assert caught.value.code == code, caught.value
    for value in named:
        assert str(value) in caught.value.message, caught.value
