"""Why: an image whose neighbour was learnt is not held out."""

from threestage.selection.folds import folds_of


def test_folds_are_of_one_size() -> None:
    folds = folds_of([f"i{n}" for n in range(10)], {}, 4)
    assert sorted(map(len, folds)) == [2, 2, 3, 3] and len({i for fold in folds for i in fold}) == 10


def test_a_group_stays_together() -> None:
    ids = [f"{scene}{n}" for scene, size in (("a", 5), ("b", 2), ("c", 2), ("d", 1)) for n in range(size)]
    folds = folds_of(ids, {image_id: image_id[0] for image_id in ids}, 2)
    assert sorted(map(len, folds)) == [5, 5]
    assert all(len({fold for fold in folds for i in fold if i[0] == scene}) == 1 for scene in "abcd")
