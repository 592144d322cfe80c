"""Near-copies on both sides of a split, such as neighbouring frames or tiles: scores on them say little of new images."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

SIDE = 16  # of the grid of grey differences that an image is compared by
ALIKE = 0.9  # cosine; CamVid's 37,000 pairs of train and val have 0.62 at most, its neighbouring frames at rest 0.95
AT_ONCE = 256  # images compared with all others in one product

Gradients = npt.NDArray[np.float32]


def gradients(image: npt.NDArray[np.uint8]) -> Gradients:
    """Horizontal and vertical differences of the grey image (H,W,3) at SIDE × SIDE, of length 1; zero for one plain colour."""
    small = Image.fromarray(image).convert("L").resize((SIDE + 1, SIDE + 1), Image.Resampling.BOX)
    grey = np.asarray(small, np.float32)
    found = np.concatenate([(grey[:-1, 1:] - grey[:-1, :-1]).ravel(), (grey[1:, :-1] - grey[:-1, :-1]).ravel()])
    return np.asarray(found / max(float(np.linalg.norm(found)), 1.0), np.float32)


def near_copies(these: Sequence[Gradients], those: Sequence[Gradients]) -> Iterator[tuple[int, int]]:
    """(number of one of these, number of the image most like it among those) for each that has a near-copy there."""
    if not these or not those:
        return
    others = np.stack(those)
    for start in range(0, len(these), AT_ONCE):
        likeness = np.stack(these[start : start + AT_ONCE]) @ others.T
        for place in np.flatnonzero(likeness.max(1) >= ALIKE):
            yield start + int(place), int(likeness[place].argmax())


def doubt(
    labelled_ids: Sequence[str],
    labelled: Sequence[Gradients],
    validation_ids: Sequence[str],
    validation: Sequence[Gradients],
) -> str | None:
    """A warning about near-copies of labelled images among the validation images; None without any."""
    found = list(near_copies(validation, labelled))
    if not found:
        return None
    first, its_copy = found[0]
    return (
        f"{len(found)} of {len(validation)} validation images nearly equal a labelled one ({validation_ids[first]} and "
        f"{labelled_ids[its_copy]} first): scores on them say little about new images; set data.group to keep images of one "
        "scene on one side"
    )
