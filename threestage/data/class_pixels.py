"""Which classes have labelled pixels. A class that no mask shows cannot be learned, and one class alone is no task."""

from collections.abc import Sequence

from threestage.errors import InputError

LEAST_CLASSES = 2
FIX = (
    "correct the class map and ingest again (for masks of 0 and 255: `ids: [0]` for the background, `ids: [255]` for the "
    "foreground, and no 255 under `ignore`)"
)


def check_class_pixels(
    where: str, names: Sequence[str], pixels: Sequence[int], seen: str, fix: str = FIX
) -> str | None:
    """A warning that names the classes without a labelled pixel, None when every class has one.

    Args:
        where: what the message begins with, such as the data set's root.
        names, pixels: of the classes, in the order of their ids.
        seen: where the pixels were counted, such as "12 labelled masks".
        fix: what to do about it.
    Raises:
        InputError: fewer than two classes have a labelled pixel.
    """
    present = [name for name, count in zip(names, pixels, strict=True) if count]
    absent = ", ".join(name for name, count in zip(names, pixels, strict=True) if not count)
    if len(present) < LEAST_CLASSES:
        found = f"only class {present[0]} has" if present else "no class has"
        missing = f" ({absent}: none)" if absent else ""
        raise InputError(
            f"{where}: {found} a labelled pixel in {seen}{missing}, and training needs two classes: {fix}",
            "data/one-class",
        )
    return f"{where}: no labelled pixel of {absent} in {seen}: label images that show it, or {fix}" if absent else None
