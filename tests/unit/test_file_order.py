"""The order of the unlabelled stream: complete passes, a function of the seed, enough images, consumed files left out."""

from threestage.data.records import DataFile
from threestage.on_ray.data import file_order

FILES = [
    DataFile(path=f"images/{i}", kind="images", split="train", rows=9, labelled_rows=0, digest=str(i)) for i in range(4)
]
ROWS = [9, 5, 0, 6]  # 20 a pass: file 1 lost four rows to validation, file 2 all of them


def images(order: list[tuple[int, DataFile]]) -> int:
    return sum(ROWS[int(file.digest)] for _, file in order)


def test_every_pass_holds_every_file_that_has_images_once() -> None:
    order = file_order(FILES, ROWS, (0, "stage2"), 0, 55)
    for pass_ in range(3):
        assert sorted(file.digest for number, file in order if number == pass_) == ["0", "1", "3"]


def test_enough_for_what_is_needed_and_one_pass_more() -> None:
    assert all(images(file_order(FILES, ROWS, (0, "s"), 0, needed)) >= needed + 20 for needed in (1, 20, 41, 300))


def test_a_resumed_stream_leaves_out_the_files_that_were_consumed() -> None:
    whole = file_order(FILES, ROWS, (3, "s"), 0, 100)
    for consumed in (0, 6, 20, 33, 59):
        rest = file_order(FILES, ROWS, (3, "s"), consumed, 100)
        assert rest == whole[-len(rest) :]
        assert images(whole) - images(rest) <= consumed < images(whole) - images(rest) + 9


def test_the_order_depends_on_seed_and_stage() -> None:
    orders = [file_order(FILES * 3, ROWS * 3, place, 0, 200) for place in ((0, "stage2"), (1, "stage2"), (0, "stage3"))]
    assert orders[0] != orders[1] and orders[0] != orders[2]
