"""Why: a result is only comparable if its split is the same tomorrow, and nested in that of a greater label count."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.refusals import refused
from tests.unit.data.test_records import manifest_of, write_part
from threestage.config import load
from threestage.data.records import DataSettings
from threestage.data.split import Split, _carve, make_split
from threestage.errors import InputError

IDS = [f"drive/{i:03d}" for i in range(40)]


def split_of(root: Path, ids: list[str], val: bool = False, before: Split | None = None, **settings: object) -> Split:
    files = [write_part(str(root), "images/train-1.parquet", {**dict.fromkeys(ids, b"m"), "unlabelled": None})]
    if val:
        files.append(write_part(str(root), "images/val-1.parquet", {"v2": b"m", "v1": b"m", "v3": None}))
    settings_ = DataSettings.model_validate({"root": str(root), **settings})
    return make_split(str(root), manifest_of(*files), settings_, before)


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
    with refused("data/too-few-labels", "data.labelled is 41", "has 40"):
        split_of(tmp_path, IDS, labelled=41)
    with refused("data/no-validation", "data.labelled gives 1 labelled", "data.validation 0.2"):
        split_of(tmp_path, IDS, labelled=1)
    with refused("data/no-masks", tmp_path, "threestage ingest"):
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
    ("content", "code", "named"),
    [
        (None, "storage/not-found", ()),
        (b"\n \n", "data/labelled-list", ()),
        (b"\xff\xfe\x00", "data/not-utf8", ()),
        (
            b"drive/001\nunlabelled.png\nother\n",
            "data/labelled-list",
            ("2 of its 3 images", "unlabelled.png", "drive/"),
        ),
    ],
)
def test_a_list_that_cannot_be_taken(tmp_path: Path, content: bytes | None, code: str, named: tuple[str, ...]) -> None:
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with refused(code, tmp_path / "list.txt", *named):
        split_of(tmp_path / "data", IDS, val=True, labelled=str(tmp_path / "list.txt"))


# ---- Groups


def drives(*sizes: int) -> list[str]:
    """Frames of drives of so many frames: d0_000, d0_001 …"""
    return [f"d{drive}_{frame:03d}" for drive, size in enumerate(sizes) for frame in range(size)]


def drives_of(ids: Iterable[str]) -> set[str]:
    return {image_id.split("_")[0] for image_id in ids}


GROUP = r"^(d\d+)_"


@pytest.mark.parametrize("labelled", ["all", 40, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_on_one_side(tmp_path: Path, labelled: int | float | str, seed: int) -> None:
    split = split_of(tmp_path, drives(10, 20, 5, 5, 30, 10), group=GROUP, labelled=labelled, split_seed=seed)
    assert split.labelled and split.validation
    assert not drives_of(split.labelled) & drives_of(split.validation)
    assert split.groups == {image_id: image_id.split("_")[0] for image_id in split.validation}
    count = {"all": 80}.get(str(labelled), 40)
    assert len(split.labelled) + len(split.validation) == count, "no more labels than asked for"
    alone = split_of(tmp_path, drives(10, 20, 5, 5, 30, 10), labelled=labelled, split_seed=seed)
    assert drives_of(alone.labelled) & drives_of(alone.validation), "a random split mixes them"


def test_the_rule_for_groups_is_frozen(tmp_path: Path) -> None:
    """The order of `printf 0:dN | sha256sum`, then that of `printf 0:dN_NNN | sha256sum`. Of three frames none validates yet:
    1.5 < ceil(0.2 · 3) is false, as is 2 < ceil(0.2 · 7); 0.5 < ceil(0.2 · 8) is true."""
    split = split_of(tmp_path, drives(3, 4, 3), group=GROUP, labelled=8)
    assert split.labelled == ("d0_000", "d0_001", "d0_002", "d1_001", "d1_003", "d1_002", "d1_000")
    assert split.validation == ("d2_001",)


def test_labels_are_drawn_group_by_group(tmp_path: Path) -> None:
    few, many = (
        split_of(tmp_path, drives(10, 10, 10), group=GROUP, labelled=n, validation=0).labelled for n in (13, 25)
    )
    assert len(few) == 13 and len(drives_of(few)) == 2 and len(drives_of(many)) == 3
    assert few == many[:13], "a smaller count is a subset of a greater one"


@given(st.lists(st.integers(1, 30), min_size=2, max_size=12), st.integers(1, 60))
@example([1, 1], 51)
def test_carved_groups_are_whole_and_the_share_is_near(sizes: list[int], percent: int) -> None:
    ids = drives(*sizes)
    split = _carve(ids, percent / 100, {image_id: image_id.split("_")[0] for image_id in ids})
    assert sorted(split.validation + split.labelled) == sorted(ids)
    assert split.validation and split.labelled and not drives_of(split.labelled) & drives_of(split.validation)
    assert abs(len(split.validation) - len(ids) * percent / 100) <= max(sizes)


def test_groups_of_a_list_and_expressions_without_brackets(tmp_path: Path) -> None:
    ids = drives(6, 6, 6)
    (tmp_path / "scenes.csv").write_text(
        "\n".join(["name,group,image_id", *(f"x,{i.split('_')[0]},{i}.png" for i in ids), "a,b,c"])
    )
    expected = split_of(tmp_path / "data", ids, group=GROUP)
    assert split_of(tmp_path / "data", ids, group=str(tmp_path / "scenes.csv")) == expected
    assert split_of(tmp_path / "data", ids, group=r"d\d+") == expected
    assert split_of(tmp_path / "data", ids, group=r"nothing|(d\d+)_") == expected


def test_a_group_of_the_val_split_is_not_learnt_from(tmp_path: Path) -> None:
    ids = ["v1_1", "v1_2", "a_1", "a_2"]
    split = split_of(tmp_path, ids, val=True, group=r"[a-z]\d?")
    assert sorted(split.labelled) == ["a_1", "a_2"] and split.validation == ("v1", "v2")
    assert split.groups == {"v1": "v1", "v2": "v2"}
    assert len(split_of(tmp_path, ids, val=True).labelled) == 4, "without groups, all are"
    (tmp_path / "list.txt").write_text("a_1\nv1_2\n")
    with refused("data/group-on-both-sides", "1 of its 2 images", "v1_2"):
        split_of(tmp_path, ids, val=True, group=r"[a-z]\d?", labelled=str(tmp_path / "list.txt"))
    with refused("data/too-few-labels", "data.labelled is 3", "has 2"):
        split_of(tmp_path, ids, val=True, group=r"[a-z]\d?", labelled=3)
    with refused("data/group-on-both-sides", "data.group"):
        split_of(tmp_path, ["v1_1", "v2_2"], val=True, group=r"[a-z]\d?")


@pytest.mark.parametrize(
    ("group", "content", "code", "named"),
    [
        (r"^x", None, "data/no-group", ("data.group=^x", "12 of 12", "d0_000")),
        ("scenes.csv", None, "storage/not-found", ()),
        ("scenes.csv", b"\xff\xfe", "data/not-utf8", ()),
        ("scenes.csv", b"", "data/group-columns", ("columns none",)),
        ("scenes.csv", b"image,scene\nd0_000,a\n", "data/group-columns", ("['image', 'scene']",)),
        ("scenes.csv", b"image_id,group\nd0_000,a\n,b\nd0_001\n", "data/no-group", ("11 of 12", "d0_001")),
        ("scenes.csv", b"image_id,group\nd0_000,\x00\n", "data/no-group", ()),
        ("scenes.csv", b"image_id,group\nd0_000,a\nd0_000.png,b\n", "data/two-groups", ("d0_000", "a and b")),
    ],
)
def test_groups_that_cannot_be_taken(
    tmp_path: Path, group: str, content: bytes | None, code: str, named: tuple[str, ...]
) -> None:
    if content is not None:
        (tmp_path / group).write_bytes(content)
    place = str(tmp_path / group) if group.endswith(".csv") else group
    with refused(code, place, *named):
        split_of(tmp_path / "data", drives(6, 6), group=place)


def test_an_expression_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.group='\(d': .*data/group-expression"):
        load("demo", ["data.root=x", "data.group=(d"])


def test_one_group_cannot_be_divided(tmp_path: Path) -> None:
    with refused("data/no-validation", "in 1 group by data.group", "data.validation 0.2"):
        split_of(tmp_path, drives(12), group=GROUP)


def test_a_run_that_continues_another_keeps_what_was_carved(tmp_path: Path) -> None:
    """Its champion must not be scored on what it learnt, nor learn what it is scored on."""
    before = split_of(tmp_path, IDS, labelled=10)
    for labelled in (25, "all"):
        now = split_of(tmp_path, [*IDS, "new/1"], before=before, labelled=labelled)
        assert now.validation == before.validation and not set(now.labelled) & set(now.validation)
        assert set(before.labelled) < set(now.labelled)
    whole = split_of(tmp_path, [*IDS, "new/1"], before=before)
    assert len(whole.labelled) == 41 - len(before.validation)


def test_what_shares_a_group_with_the_validation_of_the_run_before_is_no_label(tmp_path: Path) -> None:
    before = split_of(tmp_path, drives(4, 4, 4), group=GROUP)
    grown = drives(6, 6, 6, 3)
    now = split_of(tmp_path, grown, before=before, group=GROUP)
    apart = set(before.groups.values())
    assert now.validation == before.validation and now.groups == before.groups
    assert sorted(now.labelled) == sorted(image_id for image_id in grown if image_id.split("_")[0] not in apart)
