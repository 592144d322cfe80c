"""Binary masks: one file for each class of an image, as Labelbox and RectLabel write them. What is not 0 is the class.

The names say which is which: CLASS/IMAGE.png, IMAGE/CLASS.png or IMAGE_CLASS.png (also with - or . between them), with the
image's path below its folder for IMAGE. Masks come in the order of their paths.
"""

from collections.abc import Collection

from threestage.data.pairs import MASK_SUFFIXES, nfc
from threestage.labels.annotations import Annotations
from threestage.labels.export_files import ExportFiles
from threestage.labels.rasterise import Region

SEPARATORS = "/_-."


def read_binary_masks(files: ExportFiles, into: Annotations) -> None:
    """Every mask file whose name holds that of an image."""
    found = files.ending(*MASK_SUFFIXES)
    image_ids = {nfc(image_id) for image_id in files.image_ids()}
    for path, uri in found.items():
        stem = nfc(path.rpartition(".")[0])
        image_id, category = split_name(stem, image_ids) or (None, "")
        if image_id is None:
            into.passed_over["mask files that no image and class are named by"] += 1
            continue
        into.add_category(category, category)
        into.add_image(image_id, image_id, None)
        into.add_region(image_id, Region(category, "file", files.mask(uri)))
    if not into.images:
        raise files.wrong("no mask there is named CLASS/IMAGE.png, IMAGE/CLASS.png or IMAGE_CLASS.png")


def split_name(stem: str, image_ids: Collection[str]) -> tuple[str, str] | None:
    """The image and the class that a mask's path without suffix names; of several images the longest name."""
    for cut in range(len(stem) - 1, 0, -1):
        if stem[cut] in SEPARATORS and stem[:cut] in image_ids and "/" not in stem[cut + 1 :]:
            return stem[:cut], stem[cut + 1 :]
    category, _, rest = stem.partition("/")
    return (rest, category) if rest in image_ids else None
