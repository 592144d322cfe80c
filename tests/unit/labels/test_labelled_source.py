"""Why: an annotation at the wrong image, or of the wrong class, is a label that nobody sees to be wrong."""

import pytest

from tests.refusals import refused
from threestage.data.classes import ClassEntry, ClassMap, Ignored
from threestage.data.formats import SourceItem
from threestage.data.pairs import by_last_part, named_images
from threestage.labels.annotations import Annotations
from threestage.labels.labelled_source import LabelledSource, class_ids, map_of_classes, proposed_map
from threestage.labels.rasterise import Region

RING = Region("thing", "polygons", [[0, 0, 1, 0, 1, 1]])


@pytest.mark.parametrize(
    ("name", "ids", "fits"),
    [
        ("a.jpg", ["a", "b"], ["a"]),
        ("in/a.jpg", ["a"], ["a"]),
        ("a.jpg", ["in/a"], ["in/a"]),
        ("a.jpg", ["in/a", "on/a"], ["in/a", "on/a"]),
        ("a.jpg", ["in/a", "a"], ["a"]),
        ("in/a.jpg", ["on/a"], []),
        ("C:\\photos\\in\\a.jpg", ["in/a"], ["in/a"]),
        ("./a.v2.PNG", ["a.v2"], ["a.v2"]),
        ("a.v2", ["a.v2"], ["a.v2"]),
        ("up/0a1b2c3d-a.jpg", ["a"], ["a"]),
        ("0a1b2c3d-a.jpg", ["a", "0a1b2c3d-a"], ["0a1b2c3d-a"]),
        ("e\u0301.jpg", ["é"], ["é"]),
    ],
)
def test_which_images_a_name_fits(name: str, ids: list[str], fits: list[str]) -> None:
    assert named_images(name, by_last_part(ids)) == fits


def annotations(*names: str) -> Annotations:
    found = Annotations("export")
    found.add_category("thing", "thing")
    for number, name in enumerate(names):
        found.add_image(str(number), name, None)
        found.add_region(str(number), RING)
    return found


def labelled(found: Annotations, *ids: str) -> tuple[dict[str, str | None], list[str]]:
    """Image id → its problem, or where its mask comes from; and the notes."""
    notes: list[str] = []
    source = LabelledSource(found, map_of_classes(["thing"], [(1, 1, 1)]), "ignore")
    items = source.label([SourceItem(i, f"{i}.jpg", None, "train") for i in ids], notes)
    return {item.image_id: item.problem or item.mask_uri for item in items}, notes


def test_images_without_annotations_and_annotations_without_images() -> None:
    found, notes = labelled(annotations("a.jpg", "far.jpg"), "a", "b")
    assert found == {"a": "export#a", "b": None}
    assert notes[1] == "export: 1 of its images are not in the source: far.jpg"
    with refused("data/no-pair", "far.jpg", "first image there is b"):
        labelled(annotations("far.jpg"), "b")


def test_an_annotation_that_could_be_another_images_is_refused_by_name() -> None:
    found, _ = labelled(annotations("a.jpg"), "in/a", "on/a")
    assert found["in/a"] == "the annotations of a.jpg fit in/a and on/a: rename one [mask/unpaired]" == found["on/a"]
    found, _ = labelled(annotations("a.jpg", "in/a.png"), "in/a", "b")
    assert found == {"in/a": "is annotated twice, as a.jpg and as in/a.png: keep one [mask/unpaired]", "b": None}


def test_which_class_a_category_is() -> None:
    found = annotations("a.jpg")
    found.add_category("7", "truck", (1, 2, 3))
    found.add_region("0", Region("7", "polygons", []))
    assert [entry.name for entry in proposed_map(found, "ignore").classes] == ["thing", "truck"]
    proposed = proposed_map(found, "street")
    assert [entry.name for entry in proposed.classes] == ["street", "thing", "truck"]
    assert proposed.classes[2].colour == (1, 2, 3) and len({entry.colour for entry in proposed.classes}) == 3
    both = ClassEntry(name="vehicle", colour=(1, 1, 1), categories=("truck", "thing"))
    assert class_ids(found, ClassMap(classes=(both,))) == {"truck": 0, "thing": 0}
    ignoring = ClassMap(
        classes=(both.model_copy(update={"categories": ("truck",)}),), ignore=Ignored(categories=("thing",))
    )
    assert class_ids(found, ignoring) == {"truck": 0, "thing": 255}
    with refused("class-map/unknown-class", "road", "thing"):
        LabelledSource(annotations("a.jpg"), map_of_classes(["thing"], [(1, 1, 1)]), "road")
    with refused("data/annotations", "export"):
        proposed_map(Annotations("export"), "ignore")


def test_too_many_categories_are_refused() -> None:
    found = Annotations("export")
    for number in range(300):
        found.add_category(str(number), f"c{number}")
    with refused("data/annotations", 300):
        proposed_map(found, "ignore")
