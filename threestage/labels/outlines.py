"""Outlines of a binary mask as polygons, whose corners are pixel corners: `rasterise.fill_ring` gives the mask back exactly.

Pixels that touch at a corner only are apart. A hole is joined to its outline by a bridge without width, there and back, which
the even-odd rule does not see: so a polygon of one ring keeps its holes.
"""

import numpy as np
import numpy.typing as npt

from threestage.labels.rle import Mask

Points = npt.NDArray[np.int64]
Ring = npt.NDArray[np.float64]
LEAST_CORNERS = 3


def polygons_of(mask: Mask, simplify: float = 0) -> list[Ring]:
    """A ring (N,2) of x, y for each part of a mask (H,W), holes joined in. `simplify`: how far, in pixels, an outline may be
    moved (Douglas and Peucker 1973); a part or hole of which less than a triangle is left is dropped."""
    rings = outlines(mask)
    areas = [_area(ring) for ring in rings]
    parents = _parents(mask, rings, areas)
    found = {number: simplified(rings[number], simplify) for number, area in enumerate(areas) if area > 0}
    for number, parent in parents.items():
        hole = simplified(rings[number], simplify)
        if len(hole) >= LEAST_CORNERS and len(found[parent]) >= LEAST_CORNERS:
            found[parent] = _joined(found[parent], hole)
    return [ring for ring in found.values() if len(ring) >= LEAST_CORNERS]


def outlines(mask: Mask) -> list[Points]:
    """The closed outlines of a mask: clockwise around parts, counter-clockwise around holes; corners only."""
    starts, ends, directions = _segments(mask)
    width = mask.shape[1] + 1
    keys = (starts[:, 1] * width + starts[:, 0]) * 4 + directions
    order = np.argsort(keys)
    corners = (ends[:, 1] * width + ends[:, 0]) * 4
    right, left = (_find(keys, order, corners + (directions + turn) % 4) for turn in (1, 3))
    following = np.where(
        right >= 0, right, left
    ).tolist()  # to the right first: pixels that touch at a corner are apart
    taken = np.zeros(len(starts), bool)
    rings = []
    for first in range(len(starts)):
        ring, segment = [], first
        while not taken[segment]:
            taken[segment] = True
            ring.append(segment)
            segment = following[segment]
        if ring:
            rings.append(starts[ring])
    return rings


def _segments(mask: Mask) -> tuple[Points, Points, Points]:
    """Straight pieces of the outlines, with the mask on their right: first and last corner (x, y), and direction
    (0 to the right, 1 down, 2 to the left, 3 up)."""
    padded = np.pad(mask, 1)
    above, left = padded[:-1, 1:-1], padded[1:-1, :-1]
    below, right = padded[1:, 1:-1], padded[1:-1, 1:]
    pieces = []
    for direction, edges in ((0, below & ~above), (1, (left & ~right).T), (2, above & ~below), (3, (right & ~left).T)):
        lines, firsts, lasts = _runs(edges)
        start, end = (firsts, lasts) if direction in (0, 1) else (lasts, firsts)
        corners = [np.stack([place, lines] if direction in (0, 2) else [lines, place], 1) for place in (start, end)]
        pieces.append((*corners, np.full(len(lines), direction)))
    starts, ends, directions = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return starts, ends, directions


def _runs(edges: Mask) -> tuple[Points, Points, Points]:
    """Runs of True along the lines of (N,M): line, first place, place after the last."""
    steps = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    lines, firsts = np.nonzero(steps == 1)
    return lines, firsts, np.nonzero(steps == -1)[1]


def _find(keys: Points, order: Points, wanted: Points) -> Points:
    """The place of each wanted key, -1 where there is none."""
    if not len(keys):
        return np.zeros(0, np.int64)
    found = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return np.where(keys[found] == wanted, found, -1)


def _area(ring: Points) -> float:
    """Twice the area, positive clockwise (y downwards)."""
    following = np.roll(ring, -1, axis=0)
    return float((ring[:, 0] * following[:, 1] - following[:, 0] * ring[:, 1]).sum())


def _parents(mask: Mask, rings: list[Points], areas: list[float]) -> dict[int, int]:
    """Number of each hole's outline → that of the part around it, from above to below (as Suzuki and Abe 1985)."""
    firsts = {number: rings[number][np.lexsort(rings[number].T)[0]] for number, area in enumerate(areas) if area < 0}
    if not firsts:
        return {}
    owner = np.full((mask.shape[0], mask.shape[1] + 1), -1, np.int32)
    for number, ring in enumerate(rings):
        for (x, y), (_, bottom) in zip(ring.tolist(), np.roll(ring, -1, axis=0).tolist(), strict=True):
            owner[min(y, bottom) : max(y, bottom), x] = number
    parents: dict[int, int] = {}
    for number, (x, y) in sorted(firsts.items(), key=lambda entry: (entry[1][1], entry[1][0])):
        outside = np.flatnonzero(~mask[y, :x])
        around = int(owner[y, outside[-1] + 1 if len(outside) else 0])
        parents[number] = parents.get(around, around)
    return parents


def simplified(ring: Points, tolerance: float) -> Ring:
    """The corners of a closed ring that are needed for an outline at most `tolerance` away."""
    points = ring.astype(np.float64)
    if tolerance <= 0 or len(points) <= LEAST_CORNERS:
        return points
    far = int(((points - points[0]) ** 2).sum(1).argmax())
    closed = np.concatenate([points, points[:1]])
    kept = np.zeros(len(closed), bool)
    kept[[0, far]] = True
    waiting = [(0, far), (far, len(points))]
    while waiting:
        first, last = waiting.pop()
        if last - first < 2:
            continue
        distances = _distances(closed[first + 1 : last], closed[first], closed[last])
        worst = int(distances.argmax())
        if distances[worst] > tolerance:
            kept[first + 1 + worst] = True
            waiting += [(first, first + 1 + worst), (first + 1 + worst, last)]
    return points[kept[:-1]]


def _distances(points: Ring, start: Ring, end: Ring) -> npt.NDArray[np.float64]:
    """Of points from a segment."""
    along = end - start
    length = float(along @ along)
    share = np.clip((points - start) @ along / length, 0, 1) if length else np.zeros(len(points))
    return np.asarray(np.hypot(*(points - start - share[:, None] * along).T))


def _joined(outline: Ring, hole: Ring) -> Ring:
    """One ring: along the outline to the corner nearest to the hole, over to the hole, around it, and back."""
    near = int(((outline - hole[0]) ** 2).sum(1).argmin())
    return np.concatenate([outline[: near + 1], hole, hole[:1], outline[near:]])
