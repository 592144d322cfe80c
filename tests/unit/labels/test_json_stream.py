"""Why: annotations of a million objects must not have to fit into memory."""

import json
import tracemalloc
from pathlib import Path

import pytest

from tests.refusals import refused
from threestage.labels import json_stream
from threestage.labels.json_stream import elements


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


@pytest.mark.parametrize("chunk", [1, 2, 7, 2**20])
def test_elements_are_those_of_the_file(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    content = {"a": [1, -2.5, 'é"]', [3], {}], "b": {"c": [1]}, "d": 12, "e": [], "f": None}
    expected = [("a", 1), ("a", -2.5), ("a", 'é"]'), ("a", [3]), ("a", {}), ("b", {"c": [1]}), ("d", 12), ("f", None)]
    for text in (
        json.dumps(content),
        json.dumps(content, indent=3, ensure_ascii=False),
        "\ufeff" + json.dumps(content),
    ):
        assert list(elements(write(tmp_path / "a.json", text))) == expected
    assert list(elements(write(tmp_path / "a.json", " [1, 2] "))) == [("", 1), ("", 2)]


@pytest.mark.parametrize(
    "text", ["", "x", "{", '{"a": [1', '{"a": [1}', '{"a" 1}', "[1] 2", "[" * 5000, "[1" + "0" * 5000 + "]"]
)
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    with refused("data/annotations", "a.json"):
        list(elements(write(tmp_path / "a.json", text)))


def test_memory_is_that_of_an_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 2**14)
    entry = json.dumps({"segmentation": [[1.5] * 200]})
    path = write(tmp_path / "a.json", '{"annotations": [' + ",".join([entry] * 1_000) + "]}")
    tracemalloc.start()
    assert sum(1 for _ in elements(path)) == 1_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000 < Path(path).stat().st_size
