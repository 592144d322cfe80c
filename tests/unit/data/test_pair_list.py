"""Why: where names do not say which mask is whose, the user's list does, and a mistake in it must be named."""

from pathlib import Path

import pytest

from tests.refusals import refused
from tests.unit.data.test_formats import touch
from threestage.data.formats import IngestSettings, discover


def paired(root: Path, *rows: str, head: str = "image,mask") -> dict[str, str | None]:
    """Image id → its mask's path, or the problem."""
    (root / "lists").mkdir(exist_ok=True)
    (root / "lists/pairs.csv").write_text("\n".join([head, *rows]))
    items = discover(str(root / "x"), IngestSettings(format="folders", masks=f"{root}/lists/pairs.csv"))
    return {item.image_id: item.problem or (item.mask_uri and item.mask_uri.removeprefix(f"{root}/")) for item in items}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    touch(tmp_path, "x/in/a.jpg", "x/b.jpg", "x/c.jpg", "lists/one.png", "lists/far/two.png", "y/three.png")
    return tmp_path


def test_masks_are_those_of_the_list(root: Path) -> None:
    found = paired(root, "in/a.jpg,far/two.png", f"b,{root}/lists/one.png", "")
    assert found == {"in/a": "lists/far/two.png", "b": "lists/one.png", "c": None}
    assert paired(root, ".\\in\\a.jpg,far\\two.png")["in/a"] == "lists/far/two.png", "as Windows writes paths"


def test_what_does_not_fit_is_named(root: Path) -> None:
    found = paired(
        root, "in/a.jpg,one.png", "b.jpg,../y/three.png", "c.jpg,one.png", "c.jpg,far/two.png", "d.jpg,one.png"
    )
    where = f"{root}/lists/pairs.csv"
    assert found["in/a"] == "lists/one.png"
    assert found["b"] == f"its mask ../y/three.png, which {where} names, is not below the list's folder [mask/unpaired]"
    assert found["c"] == f"stands in {where} with two masks, one.png and far/two.png: keep one [mask/unpaired]"
    assert found["one"] == f"mask of d.jpg in {where}, which is not among the images [mask/unpaired]"


def test_masks_among_the_images_are_no_images(root: Path) -> None:
    (root / "x/pairs.csv").write_text("image,mask\nb.jpg,m.png\n")
    touch(root, "x/m.png")
    items = discover(str(root / "x"), IngestSettings(format="folders", masks=f"{root}/x/pairs.csv"))
    assert {item.image_id: bool(item.mask_uri) for item in items} == {"in/a": False, "b": True, "c": False}


def test_lists_that_cannot_be_used_are_refused(root: Path) -> None:
    with refused("data/pair-columns", "pairs.csv", "name"):
        paired(root, "a,b", head="name,file")
    with refused("data/no-pair", "pairs.csv", "d.jpg"):
        paired(root, "d.jpg,one.png")
    with refused("storage/not-found", "none.csv"):
        discover(str(root / "x"), IngestSettings(format="folders", masks=f"{root}/lists/none.csv"))
    with pytest.raises(ValueError, match="data/format-option"):
        IngestSettings(format="folders", masks="pairs.csv", mask_suffix="_m")
