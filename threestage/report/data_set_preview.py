"""preview.png in the folder of a data set: photos beside themselves under their masks, so that a wrong colour is seen at once."""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from threestage.data import storage
from threestage.data.band_images import decode_pixels
from threestage.data.bands import shown_bands
from threestage.data.formats import SPLITS
from threestage.data.records import (
    DECODER_ERRORS,
    MAX_IMAGE_PIXELS,
    PREVIEW_NAME,
    Bytes,
    Manifest,
    decode_mask,
    files_with_masks,
    load_manifest,
)
from threestage.report.mask_images import overlay, panel

PHOTOS, BLOCKS = 8, 2  # photos, and pairs of columns that they stand in
WIDTH, HEIGHT = 320, 240  # of a photo at most, in pixels
MADE_OF = "threestage data set"  # key of the text in the PNG


def write_preview(root: str) -> str | None:
    """Where the picture lies, which is drawn unless it shows the present data set. None where no image has a mask, or where a
    file of the user's has its name."""
    manifest, uri = load_manifest(root), storage.join(root, PREVIEW_NAME)
    made_of = hashlib.sha256(f"{manifest.digest} {manifest.colours}".encode()).hexdigest()[:16]
    if storage.exists(uri):
        shows = _made_of(storage.read_bytes(uri))
        if shows in (None, made_of):
            return None if shows is None else uri
    pairs = [_seen(row, manifest) for row in islice(_labelled(root, manifest), PHOTOS)]
    if not pairs:
        return None
    columns = [
        (title, [pair[place] for pair in pairs[block::BLOCKS]])
        for block in range(min(BLOCKS, len(pairs)))
        for place, title in enumerate(("photo", "labels"))
    ]
    about, stream = PngInfo(), io.BytesIO()
    about.add_text(MADE_OF, made_of)
    panel(columns, manifest.classes, manifest.colours).save(stream, format="PNG", pnginfo=about)
    storage.write_bytes(uri, stream.getvalue())
    return uri


def _made_of(data: bytes) -> str | None:
    """What a picture of ours shows; None for another one."""
    with contextlib.suppress(*DECODER_ERRORS), Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return image.info.get(MADE_OF)
    return None


def _labelled(root: str, manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Rows with masks, the latest files first; a file is in the order of a hash, so its first rows are a sample of it."""
    seen = set[str]()
    for file in (file for split in SPLITS for file in reversed(files_with_masks(manifest, split))):
        for group in storage.read_groups(storage.join(root, file.path), ["image_id", "image", "mask"]):
            for row in group.to_pylist():
                if row["image_id"] not in seen and row["mask"] is not None:
                    yield row
                seen.add(row["image_id"])


def _seen(row: dict[str, Any], manifest: Manifest) -> tuple[Bytes, Bytes]:
    """The photo and the photo under its mask, made smaller."""
    image = shown_bands(decode_pixels(row["image"], MAX_IMAGE_PIXELS, manifest.bands))
    mask = decode_mask(row["mask"])
    height, width = mask.shape
    factor = min(1.0, HEIGHT / height, WIDTH / width)
    size = max(1, round(factor * width)), max(1, round(factor * height))
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    return image, overlay(image, mask, manifest.colours)
