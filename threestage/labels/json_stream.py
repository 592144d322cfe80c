"""JSON files of any size, one element at a time: memory is that of the largest element, not of the file."""

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from threestage.data import storage
from threestage.errors import InputError

CHUNK_BYTES = 2**20
MAX_ELEMENT = 2**26
"""Characters of one element, and of white space between two."""
DECODER = json.JSONDecoder()
OF_NUMBERS = "+-.0123456789eE"
SPACE = re.compile(r"[ \t\r\n]*")
CODE = "data/annotations"


def elements(uri: str) -> Iterator[tuple[str, Any]]:
    """(key, element) of every array among the values of a JSON object, and (key, value) of its other values; of a JSON
    array ("", element). Raises InputError for what is no JSON, and as `storage.read_bytes`."""
    files, path = storage.filesystem(uri)
    storage.refuse_special_file(uri)
    with files.open_input_stream(path) as stream, _readable(uri):
        text = _Text(stream, uri)
        if text.peek() == "[":
            yield from (("", element) for element in _array(text))
        else:
            for key in _keys(text):
                if text.peek() == "[":
                    yield from ((key, element) for element in _array(text))
                else:
                    yield key, text.value()
        if text.peek():
            raise ValueError("something follows its end")


@contextlib.contextmanager
def _readable(uri: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{uri}: is no JSON that can be read ({error}); export it again", CODE) from None


def _keys(text: "_Text") -> Iterator[str]:
    """The keys of an object; the caller reads the value of each."""
    text.take("{")
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        yield str(key)
        if text.peek() != "}":
            text.take(",")
    text.take("}")


def _array(text: "_Text") -> Iterator[Any]:
    text.take("[")
    while text.peek() != "]":
        yield text.value()
        if text.peek() != "]":
            text.take(",")
    text.take("]")


class _Text:
    """The text of a stream, of which a window is in memory."""

    def __init__(self, stream: Any, uri: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._window = ""
        self._place = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self._place = self._place + len(SPACE.match(self._window, self._place)[0])  # type: ignore[index]
            if self._place < len(self._window) or self._ended:
                return self._window[self._place : self._place + 1]
            self._more()

    def take(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise ValueError(f"{character} is expected, not {found or 'its end'}")
        self._place += 1

    def value(self) -> Any:
        """The next value. A window that ends in it is made larger."""
        self.peek()
        while True:
            is_all = self._ended or len(self._window) - self._place > MAX_ELEMENT
            try:
                value, end = DECODER.raw_decode(self._window, self._place)
            except ValueError:
                if is_all:
                    raise
            else:
                if is_all or self._window[end : end + 1] not in OF_NUMBERS:  # else a number may continue
                    self._place = end
                    return value
            self._more()

    def _more(self) -> None:
        """Read on; as much again as is waiting, so that a long value is not parsed too often."""
        data = self._stream.read(max(CHUNK_BYTES, len(self._window) - self._place))
        self._ended = not data
        self._window = self._window[self._place :] + self._decoder.decode(data, final=self._ended)
        self._place = 0
