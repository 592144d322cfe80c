"""The order of the unlabelled stream: complete passes, a function of the seed, enough images, consumed files left out;
and the buffer that mixes it: every row once."""

from collections.abc import Iterator

import numpy as np

from threestage.ray_backend.pool_reader import blocks
from threestage.ray_backend.pool_stream import file_order, mixed

ROWS = [9, 5, 0, 6]  # 20 a pass: file 1 lost four rows to validation, file 2 all of them


def images(order: list[tuple[int, int]]) -> int:
    return sum(ROWS[number % 4] for _, number in order)


def test_every_pass_holds_every_file_that_has_images_once() -> None:
    order = file_order(ROWS, (0, "stage2"), 0, 60)
    for pass_ in range(3):
        assert sorted(number for p, number in order if p == pass_) == [0, 1, 3]


def test_enough_for_what_is_needed_and_not_a_file_more() -> None:
    for needed in (1, 20, 41, 300):
        assert needed <= images(file_order(ROWS, (0, "s"), 0, needed)) < needed + 9


def test_of_a_large_pool_only_what_the_steps_need_is_planned() -> None:
    assert len(file_order([256] * 400_000, (0, "s"), 256 * 1000, 256 * 1010)) == 10


def test_a_resumed_stream_leaves_out_the_files_that_were_consumed() -> None:
    whole = file_order(ROWS, (3, "s"), 0, 100)
    for consumed in (0, 6, 20, 33, 59):
        rest = file_order(ROWS, (3, "s"), consumed, 100)
        assert rest == whole[-len(rest) :]
        assert images(whole) - images(rest) <= consumed < images(whole) - images(rest) + 9


def test_the_order_depends_on_seed_and_stage() -> None:
    orders = [file_order(ROWS * 3, place, 0, 200) for place in ((0, "stage2"), (1, "stage2"), (0, "stage3"))]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def parts(rows: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, rows, 50):
        ids = np.arange(start, min(start + 50, rows))
        yield {"image": ids[:, None, None, None] * np.ones((1, 2, 2, 3)), "image_id": ids.astype(str).astype(object)}


def test_the_buffer_yields_every_row_once_and_in_a_mixed_order() -> None:
    batches = list(mixed(parts(1000), 8, np.random.default_rng(0)))
    ids = [int(i) for batch in batches for i in batch["image_id"]]
    assert sorted(ids) == list(range(1000)) and all(len(batch["image"]) == 8 for batch in batches)
    assert all((batch["image"][:, 0, 0, 0] == batch["image_id"].astype(int)).all() for batch in batches)
    early = np.array(ids[:256])
    assert early.max() > 300 and abs(np.diff(early)).mean() > 10
    again = [int(i) for batch in mixed(parts(1000), 8, np.random.default_rng(0)) for i in batch["image_id"]]
    assert ids == again


def test_the_rest_that_fills_no_batch_is_dropped() -> None:
    assert [len(batch["image"]) for batch in mixed(parts(61), 8, np.random.default_rng(0))] == [8] * 7


def test_blocks_hold_every_row_and_are_just_above_their_size() -> None:
    canvas = (512, 1024)
    rows = [{"image": np.full((1,), i), "image_id": np.array(str(i))} for i in range(30)]
    lengths = [len(block["image"]) for block in blocks(iter(rows), canvas)]
    assert sum(lengths) == 30 and set(lengths[:-1]) == {15}
