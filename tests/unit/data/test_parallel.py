"""What is made ahead must keep its order, stay few, and pass errors on: else a batch is lost, or the memory fills."""

from collections.abc import Iterator

import pytest

from threestage.data.parallel import ahead, map_ahead


@pytest.mark.parametrize("depth", [1, 3])
def test_ahead_gives_all_and_passes_errors_on(depth: int) -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise OSError("disk gone")

    items = ahead(failing(), depth)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="disk gone"):
        next(items)
    assert list(ahead(iter([]), depth)) == []


def test_few_items_are_made_ahead() -> None:
    made = list[int]()

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = ahead(source(), 3)
    assert next(items) == 0
    items.close()
    assert len(made) <= 4
    made.clear()
    results = map_ahead(lambda number: -number, source(), threads=2)
    assert next(results) == 0 and len(made) <= 4
    assert list(results) == [-number for number in range(1, 100)]
