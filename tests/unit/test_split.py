"""Why: a result is only comparable if its split is the same tomorrow, and nested in that of a greater label count."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_records import manifest_of, write_part
from threestage.data.records import DataSettings
from threestage.data.split import Split, _carve, make_split
from threestage.errors import InputError

IDS = [f"drive/{i:03d}" for i in range(40)]


def split_of(root: Path, ids: list[str], val: bool = False, **settings: object) -> Split:
    files = [write_part(str(root), "images/train-1.parquet", {**dict.fromkeys(ids, b"m"), "unlabelled": None})]
    if val:
        files.append(write_part(str(root), "images/val-1.parquet", {"v2": b"m", "v1": b"m", "v3": None}))
    settings_ = DataSettings.model_validate({"root": str(root), **settings})
    return make_split(str(root), manifest_of(*files), settings_)


def test_the_rule_is_frozen(tmp_path: Path) -> None:
    split = split_of(tmp_path, IDS, labelled=6, validation=0.2)
    assert split.validation_split == "carved"
    # The order of `printf 0:drive/NNN | sha256sum`; of these six, the positions 0 and 5 are carved.
    assert split.labelled == ("drive/027", "drive/032", "drive/010", "drive/023")
    assert split.validation == ("drive/013", "drive/022")


def test_a_val_split_is_used_whole_and_nothing_is_carved(tmp_path: Path) -> None:
    split = split_of(tmp_path, IDS, val=True, labelled=6)
    assert split.validation_split == "val" and split.validation == ("v1", "v2") and len(split.labelled) == 6


@pytest.mark.parametrize(("labelled", "count"), [("all", 40), (0.25, 10), (0.001, 1), (40, 40)])
def test_counts_and_fractions(tmp_path: Path, labelled: int | float | str, count: int) -> None:
    assert len(split_of(tmp_path, IDS, labelled=labelled, validation=0).labelled) == count


def test_splits_are_nested_and_outlive_new_images(tmp_path: Path) -> None:
    few, many = (split_of(tmp_path, IDS, labelled=count) for count in (10, 25))
    assert set(few.labelled) < set(many.labelled) and set(few.validation) < set(many.validation)
    assert not set(many.labelled) & set(many.validation)
    grown = split_of(tmp_path, [*IDS, "new/1", "new/2"], labelled="all", validation=0).labelled
    assert [i for i in grown if i in IDS] == list(split_of(tmp_path, IDS, validation=0).labelled)
    assert split_of(tmp_path, IDS, split_seed=1, labelled=10) != few


@given(st.integers(2, 300), st.integers(1, 99))
def test_the_carved_share_is_exact(count: int, percent: int) -> None:
    ids = [str(i) for i in range(count)]
    expected = -(-count * percent // 100)
    if expected < count:
        split = _carve(ids, percent / 100)
        assert len(split.validation) == expected
        assert sorted(split.validation + split.labelled) == sorted(ids)


def test_refusals_name_the_key_and_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.labelled is 41, but .* has 40 labelled"):
        split_of(tmp_path, IDS, labelled=41)
    with pytest.raises(InputError, match=r"data\.labelled gives 1 labelled and data\.validation 0\.2 takes"):
        split_of(tmp_path, IDS, labelled=1)
    with pytest.raises(InputError, match="no train image has a mask"):
        split_of(tmp_path, [])


def test_a_published_list_is_taken(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("drive/003.jpg masks/003.png\n\ndrive/021\ndrive/003\n")
    split = split_of(tmp_path / "data", IDS, val=True, labelled=str(tmp_path / "list.txt"))
    assert sorted(split.labelled) == ["drive/003", "drive/021"] and split.validation == ("v1", "v2")


def test_ids_with_spaces_are_taken_from_a_list(tmp_path: Path) -> None:
    ids = ["a photo", "a photo (1)", "a", "photo 1.2"]
    (tmp_path / "list.txt").write_bytes("\ufeffa photo (1).jpg\r\na photo\r\nphoto 1.2\r\n".encode())
    split = split_of(tmp_path / "data", ids, val=True, labelled=str(tmp_path / "list.txt"))
    assert sorted(split.labelled) == ["a photo", "a photo (1)", "photo 1.2"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; give a count, a fraction below 1, all, or a file with an image id a line"),
        (b"\n \n", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (
            b"drive/001\nunlabelled.png\nother\n",
            r"2 of its 3 images are no train images with a mask in .*, unlabelled.png first .*drive/",
        ),
    ],
)
def test_a_list_that_cannot_be_taken(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(InputError, match=words):
        split_of(tmp_path / "data", IDS, val=True, labelled=str(tmp_path / "list.txt"))
