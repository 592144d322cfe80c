"""The unlabelled stream: its order, its blocks, the buffers that mix it, and that it continues exactly where it stood."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import tiny_config
from threestage.data.pool import PoolFile
from threestage.ray_backend.pool_reader import Arrays, FilePart, blocks
from threestage.ray_backend.pool_stream import (
    SHUFFLE_ROWS,
    begin_of,
    file_order,
    first_row,
    images_to_come,
    mixed,
    parts_from,
    rows_of_blocks,
)
from threestage.training.checkpoint import Pointer, StreamPosition, StreamState

ROWS = [9, 6, 0, 6]  # 21 a pass, in blocks of three
IMAGES = [9, 5, 0, 6]  # of file 1 one row is blank, of file 2 all images are for validation
PLACE = (3, "stage2")
BLANK = {"image": np.zeros((1, 1, 3), np.uint8), "image_id": np.array("")}


def test_every_pass_holds_every_file_that_has_images_once() -> None:
    order = file_order(ROWS, PLACE, 0, 63)
    for pass_ in range(3):
        assert sorted(number for p, number, _ in order if p == pass_) == [0, 1, 3]
    ends = [start + ROWS[number] for _, number, start in order]
    assert [start for _, _, start in order] == [0, *ends[:-1]] and ends[-1] == 63


def test_enough_for_what_is_needed_and_not_a_file_more() -> None:
    for last in (1, 20, 41, 300):
        _, number, start = file_order(ROWS, PLACE, 0, last)[-1]
        assert start < last <= start + ROWS[number]


def test_of_a_large_pool_only_what_the_steps_need_is_planned() -> None:
    assert len(file_order([256] * 400_000, PLACE, 256 * 1000, 256 * 1010)) == 10


def test_a_continued_stream_leaves_out_the_files_that_were_used() -> None:
    whole = file_order(ROWS, PLACE, 0, 105)
    for first in (0, 6, 21, 33, 60):
        rest = file_order(ROWS, PLACE, first, 105)
        assert rest == whole[-len(rest) :]
        _, number, start = rest[0]
        assert start <= first < start + ROWS[number]


def test_the_order_depends_on_seed_and_stage() -> None:
    orders = [file_order(ROWS * 3, place, 0, 200) for place in ((0, "stage2"), (1, "stage2"), (0, "stage3"))]
    assert orders[0] != orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize(
    ("images", "most", "size"),
    [([64] * 9, 70, 64), ([256] * 9, 70, 64), ([3, 5, 900], 40, 25), ([3] * 9, 70, 3), ([7], 1, 1), ([], 5, 1)],
)
def test_blocks_have_the_size_that_leaves_few_rows_blank(images: list[int], most: int, size: int) -> None:
    assert rows_of_blocks(images, most) == size


def test_a_checkpoint_of_an_older_version_begins_with_its_file() -> None:
    before = file_order(IMAGES, PLACE, 0, 100)
    for used in (0, 7, 33):
        found = file_order(ROWS, PLACE, first_row(ROWS, IMAGES, PLACE, Pointer(unlabelled_images=used), 3), 100)
        (wanted,) = [(p, n) for p, n, start in before if start <= used < start + IMAGES[n]]
        assert found[0][:2] == wanted


# ---- Blocks


def rows(count: int, first: int = 0) -> Iterator[Arrays]:
    for value in range(first, first + count):
        yield {"image": np.full((1, 1, 3), value % 256, np.uint8), "image_id": np.array(str(value))}


def part(first: int, images: int, slots: int, begin: int = 0, pass_: int = 0, name: str = "") -> FilePart:
    file = PoolFile(uri="f", rows=images, digest=name, own=True)
    return FilePart(file=file, pass_=pass_, first=first, rows=slots, images=images, block_rows=3, begin=begin)


def test_a_file_has_as_many_rows_however_many_could_be_read() -> None:
    for readable in (0, 4, 8):
        made = list(blocks(rows(readable), BLANK, part(30, 8, 9)))
        assert [len(block["number"]) for block in made] == [3, 3, 3]
        together = {name: np.concatenate([block[name] for block in made]) for name in made[0]}
        assert together["number"].tolist() == list(range(30, 39)) and together["filled"].sum() == readable
        assert together["image_id"][together["filled"]].tolist() == [str(n) for n in range(readable)]


def test_blocks_that_were_used_are_left_out() -> None:
    whole, (last,) = list(blocks(rows(8), BLANK, part(30, 8, 9))), blocks(rows(8), BLANK, part(30, 8, 9, begin=36))
    assert last["number"].tolist() == [36, 37, 38]
    assert last["image_id"].tolist() == whole[-1]["image_id"].tolist()


def test_no_worker_gets_the_short_blocks_of_all_files() -> None:
    """Files of three blocks, dealt out to three workers: all three get as many images, and none waits for the others' blocks."""
    taken = np.zeros(3, int)
    for pass_ in range(40):
        for name in "abcde":
            made = [block["filled"].sum() for block in blocks(rows(7), BLANK, part(0, 7, 9, pass_=pass_, name=name))]
            assert sorted(made) == [2, 2, 3]
            taken += made
    assert taken.sum() == 1400 and taken.max() - taken.min() < 40


# ---- What a worker makes of its blocks

WIDTH = SHUFFLE_ROWS // 8 * 8


def dealt(rank: int, workers: int, first: int = 0, count: int = 400) -> Iterator[Arrays]:
    """Every block for one of the workers in turn, as Ray deals them out; every seventh row is blank."""
    for number in range(first + rank * 5, 5 * count, workers * 5):
        numbers = np.arange(number, number + 5)
        yield {
            "image": numbers[:, None], "image_id": numbers.astype(str).astype(object), "number": numbers,
            "filled": numbers % 7 > 0,
        }  # fmt: skip


def ids(batches: Sequence[tuple[Arrays, StreamPosition]]) -> list[list[int]]:
    return [[int(i) for i in batch["image_id"]] for batch, _ in batches]


def test_the_buffers_yield_every_filled_row_once_and_mixed() -> None:
    batches = list(mixed(dealt(0, 1), 8, (0,), 0))
    found = [i for batch in ids(batches) for i in batch]
    filled = [n for n in range(2000) if n % 7]
    assert all(len(batch) == 8 for batch in ids(batches)) and len(filled) - len(found) < 8
    assert len(set(found)) == len(found) and set(found) <= set(filled)
    assert sorted(found[:WIDTH]) == filled[:WIDTH] and abs(np.diff(found[:WIDTH])).mean() > 10
    assert all((batch["image"][:, 0] == batch["number"]).all() for batch, _ in batches)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_group_of_the_same_size_continues_with_the_same_batches(workers: int) -> None:
    """Wherever it stood: in mid buffer, at its end, after having been continued before."""
    whole = [list(mixed(dealt(rank, workers), 8, (0, rank), rank)) for rank in range(workers)]
    for step, then in ((1, 2), (31, 1), (32, 30), (33, 9)):
        stood, used = [batches[step - 1][1] for batches in whole], step
        for more in (then, 3):
            first = first_row([10_000], [10_000], PLACE, Pointer(stream=stood), 5)
            assert first <= min(position.number for position in stood)
            again = [list(mixed(dealt(r, workers, first), 8, (0, r), r, stood[r])) for r in range(workers)]
            for rank in range(workers):
                assert ids(again[rank]) == ids(whole[rank][used:])
            stood, used = [batches[more - 1][1] for batches in again], used + more


@pytest.mark.parametrize("workers", [2, 3])
def test_the_stream_is_as_long_wherever_it_is_continued(workers: int, tmp_path: Path) -> None:
    """To the last step, which lies in the third buffer: a buffer that was cut short by the stream's end would be mixed anew."""
    steps, sizes = 70, [7, 3, 0, 11, 90]
    config = tiny_config(
        tmp_path, cluster={"workers": workers}, stage2={"steps": steps, "labelled_batch": 2, "unlabelled_batch": 8}
    )
    files = [PoolFile(uri="f", rows=size, digest=str(size), own=True) for size in sizes]
    stood: dict[int, list[StreamPosition]] = {}

    def continued(begin: Pointer) -> list[list[list[int]]]:
        """The batches of each worker, through Ray's dealing out of the blocks in turn."""
        parts = parts_from(begin, files, sizes, PLACE, 3, images_to_come(config, "stage2", begin.step, 3))
        made = [block for part in parts for block in blocks(rows(part.images, part.first), BLANK, part)]
        group = []
        for rank in range(workers):
            position = begin.stream[rank] if begin.stream else None
            found = list(islice(mixed(made[rank::workers], 8, (rank,), rank, position), steps - begin.step))
            for step, (_, reached) in enumerate(found, begin.step + 1):
                stood.setdefault(step, []).append(reached)
            group.append(ids(found))
        return group

    whole = continued(Pointer())
    assert all(len(batches) == steps for batches in whole)
    for step in (1, 31, 32, 33, 50, 63, 64, 65, 69):
        begin = Pointer(step=step, stream=stood[step][:workers])
        assert continued(begin) == [batches[step:] for batches in whole]


def test_groups_of_other_sizes_take_every_row_once() -> None:
    """Two workers, then three, then two again, each group lost after some steps; the last goes on to the end."""
    state, used, found = None, list[int](), list[int]()
    for workers, steps in ((2, 45), (3, 20), (3, 1), (2, 3), (1, 200)):
        pointer = Pointer() if state is None else Pointer(stream=state.positions)
        first, group = first_row([10_000], [10_000], PLACE, pointer, 5), []
        for rank in range(workers):
            begin, used = begin_of(state, rank, workers)
            group.append(list(mixed(dealt(rank, workers, first), 8, (0, rank), rank, begin, used))[:steps])
        found += [i for batches in group for batch in ids(batches) for i in batch]
        state = StreamState([batches[-1][1] for batches in group], used)
    filled = {number for number in range(2000) if number % 7}
    assert len(found) == len(set(found)) and set(found) <= filled and len(filled) - len(found) < 8


def test_a_stream_for_a_later_checkpoint_is_refused() -> None:
    with pytest.raises(RuntimeError, match="later checkpoint"):
        next(mixed(dealt(0, 1, first=50), 8, (0,), 0, StreamPosition(5, 0, 40)))


def test_a_stream_that_has_no_rows_yields_no_batch() -> None:
    assert list(mixed(iter([]), 8, (0,), 0)) == []
