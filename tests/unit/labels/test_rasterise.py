"""Why: a polygon must mean the same pixels whichever tool it came from."""

import numpy as np
import pytest
from PIL import Image

from tests.images import encoded
from tests.refusals import refused
from threestage.data.headers import BadImage
from threestage.data.image_validation import BadFile
from threestage.labels import rasterise
from threestage.labels.rasterise import Region, draw, encode_drawing, fill_ring


def filled(*ring: float, size: tuple[int, int] = (4, 5)) -> list[list[int]]:
    patch = fill_ring(np.array(ring).reshape(-1, 2), size)
    whole = np.zeros(size, int)
    whole[patch.top : patch.top + patch.inside.shape[0], patch.left : patch.left + patch.inside.shape[1]] = patch.inside
    return np.argwhere(whole).tolist()


def test_a_pixel_belongs_to_a_ring_when_its_centre_does() -> None:
    assert filled(1, 1, 3, 1, 3, 2, 1, 2) == [[1, 1], [1, 2]]
    assert filled(0.5, 0.5, 2.5, 0.5, 2.5, 1.5, 0.5, 1.5) == [[0, 0], [0, 1]], (
        "an edge's centres are right of it or below"
    )
    assert filled(0.6, 0.6, 1.4, 0.6, 1.4, 1.4, 0.6, 1.4) == [], "no centre in it"
    assert filled(0, 0, 3, 0, 0, 3) == [[0, 0], [0, 1], [1, 0]], "the centres on the long edge are outside"


def test_rings_that_share_an_edge_share_no_pixel_and_leave_no_gap() -> None:
    rng, size = np.random.default_rng(0), (30, 40)
    for _ in range(20):
        (x, y), (u, v) = rng.uniform(0, 30, 2), rng.uniform(5, 30, 2)
        count = np.zeros(size, int)
        for ring in ([0, 0, x, 0, u, 30, 0, 30], [x, 0, 40, 0, 40, 30, u, 30]):
            for row, column in filled(*ring, size=size):
                count[row, column] += 1
        assert (count == 1).all(), (x, y, u, v)


def test_a_ring_outside_the_image_is_cut() -> None:
    assert len(filled(-1e9, -1e9, 1e9, -1e9, 1e9, 1e9, -1e9, 1e9)) == 20
    assert filled(9, 9, 12, 9, 12, 12) == [] and filled(-9, 1, -2, 1, -2, 3) == []


def test_a_ring_that_crosses_itself_is_filled_by_the_even_odd_rule() -> None:
    twice = [0, 0, 4, 0, 4, 4, 0, 4]
    assert filled(*twice, *twice) == []


@pytest.mark.parametrize("ring", [[1, 1, float("nan"), 2], [float("inf"), 1, 2, 2]])
def test_corners_that_are_no_numbers_are_refused(ring: list[float]) -> None:
    with refused("mask/shape", error=BadImage):
        filled(*ring)


def test_a_ring_that_would_take_hours_is_refused() -> None:
    ring = np.array([[0, 0], [1, 8000]] * 3000, float)
    with refused("mask/costly", error=BadImage):
        fill_ring(ring, (8000, 10))


def drawn(*regions: Region, size: tuple[int, int] = (2, 3), of: tuple[int, int] | None = (2, 3)) -> list[list[int]]:
    return draw(encode_drawing(regions, {"a": 0, "b": 1}, of, 255), size, "x").tolist()


def test_later_regions_lie_over_earlier_ones() -> None:
    whole, left = (
        Region("a", "polygons", [[0, 0, 3, 0, 3, 2, 0, 2]]),
        Region("b", "polygons", [[0, 0, 1, 0, 1, 2, 0, 2]]),
    )
    assert drawn(whole, left) == [[1, 0, 0], [1, 0, 0]] and drawn(left, whole) == [[0, 0, 0], [0, 0, 0]]
    assert drawn(left) == [[1, 255, 255], [1, 255, 255]]


def test_shapes_of_every_kind() -> None:
    runs = {"counts": [1, 1], "order": "rows", "box": [1, 0, 1, 2]}
    assert drawn(Region("a", "runs", runs)) == [[255, 255, 255], [255, 0, 255]]
    assert drawn(Region("a", "unit-polygons", [[0, 0, 0.5, 0, 0.5, 1, 0, 1]]))[0] == [0, 255, 255]
    assert drawn(Region("a", "ellipse", [1.5, 1, 0.6, 1.1, 0])) == [[255, 0, 255], [255, 0, 255]]
    assert drawn(Region("a", "ellipse", [1.5, 0.5, 0.1, 9, 90])) == [[0, 0, 0], [255, 255, 255]]


def test_the_crossings_of_all_polygons_of_an_image_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    square = [0, 0, 3, 0, 3, 2, 0, 2]  # two edges, each with two rows
    monkeypatch.setattr(rasterise, "MAX_CROSSINGS", 8)
    drawn(Region("a", "polygons", [square, square]))
    for regions in ([Region("a", "polygons", [square] * 3)], [Region("a", "polygons", [square])] * 3):
        with refused("mask/costly", error=BadFile):
            drawn(*regions)


def test_a_huge_ellipse_is_drawn_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ellipse = Region("a", "ellipse", [40, 30, 35, 20, 30])
    whole = drawn(ellipse, size=(60, 80), of=None)
    monkeypatch.setattr(rasterise, "ROWS_BYTES", 8 * 80 * 7)
    assert drawn(ellipse, size=(60, 80), of=None) == whole and 0 < np.sum(np.array(whole) == 0) < 60 * 80
    patches = list(rasterise.SHAPES["ellipse"]([40, 30, 1e9, 1e9, 0], (60, 80)))
    assert max(patch.inside.size for patch in patches) <= 80 * 7 and all(patch.inside.all() for patch in patches)


@pytest.mark.parametrize(
    ("code", "region"),
    [
        ("mask/shape", Region("a", "polygons", 7)),
        ("mask/shape", Region("a", "polygons", [["x", 2]])),
        ("mask/shape", Region("a", "polygons", [[1, 2, 3]])),
        ("mask/shape", Region("a", "polygons", [[10**400, 2]])),
        ("mask/shape", Region("a", "ellipse", [1, 1, 0, 1, 0])),
        ("mask/shape", Region("a", "runs", {"counts": [1]})),
        ("mask/shape", Region("a", "runs", {"counts": [4], "order": "rows", "box": [2, 0, 2, 2]})),
        ("mask/run-length", Region("a", "brush", "abc")),
        ("mask/shape", Region("a", "png", {"data": "§", "box": [0, 0, 1, 1]})),
        ("image/undecodable", Region("a", "png", {"data": "", "box": [0, 0, 1, 1]})),
        ("image/unreadable", Region("a", "file", {"uri": "/no/such.png"})),
    ],
)
def test_a_damaged_shape_costs_its_image(code: str, region: Region) -> None:
    with refused(code, "x ", error=BadFile):
        drawn(region)


def test_regions_of_another_size_are_refused() -> None:
    with refused("mask/size", "3x2", "2x3", error=BadFile):
        drawn(size=(3, 2))


def test_values_without_a_category_are_counted(tmp_path: object) -> None:
    image = Image.fromarray(np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 0]]] * 2, np.uint8))
    uri = f"{tmp_path}/m.png"
    with open(uri, "wb") as file:
        file.write(encoded(image))
    assert drawn(Region("", "values", {"uri": uri, "values": {"1": "a", "256": "b"}}))[0] == [0, 1, 255]
    with refused("mask/unknown-value", "256 (2 pixels)", error=BadFile):
        drawn(Region("", "values", {"uri": uri, "values": {"1": "a"}}))
