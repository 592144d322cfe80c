"""next.html: the images to label next, with what the champion sees there, how sure it is, and why each was chosen."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from threestage.data import storage
from threestage.data.band_images import decode_pixels
from threestage.data.bands import Bands
from threestage.data.pool import PoolRow, read_pool_rows
from threestage.data.records import MAX_IMAGE_PIXELS
from threestage.labels.predicted_masks import PredictedMask, masks_of_file
from threestage.models.export import ModelCard
from threestage.prediction.champion import PoolPredictions
from threestage.report import mask_images
from threestage.report.report import render_page

PAGE, TEMPLATE = "next.html", "selection.html.j2"
MOST_PICTURES = 100
"""A page of more takes a browser long; the list has all."""


def write_page(out: str, done: Mapping[str, Any], predictions: PoolPredictions, card: ModelCard) -> None:
    """`done`: what next.json holds."""
    colours = mask_images.class_colours(card.colours)
    images: Sequence[Mapping[str, Any]] = done["images"][:MOST_PICTURES]
    shown = {image["image_id"] for image in images}
    pictures = {
        row.image_id: _pictures(row, mask, colours, card.bands) for row, mask in _seen(predictions, card, shown)
    }
    page = render_page(
        TEMPLATE,
        "next",
        title=f"{len(done['images'])} images to label next",
        intro=f"Chosen out of {done['pool']:,} by the strategy {done['strategy']}, with the champion of {done['run']}.",
        classes=list(zip(card.classes, colours, strict=True)),
        images=[(image, pictures.get(image["image_id"], ())) for image in images],
        not_shown=len(done["images"]) - len(images),
    )
    storage.write_bytes(storage.join(out, PAGE), page.encode("utf-8", "replace"))


def _seen(predictions: PoolPredictions, card: ModelCard, wanted: set[str]) -> Iterator[tuple[PoolRow, PredictedMask]]:
    """The rows of the pool that were predicted, each with its mask; one image in memory at a time."""
    for file in predictions.files:
        rows = chain.from_iterable(read_pool_rows(file, masks=False))
        for mask in masks_of_file(predictions.folder, file, card):
            row = next((row for row in rows if row.image_id == mask.image_id and not row.replaced), None)
            if row is not None and row.problem is None and row.image_id in wanted:
                yield row, mask


def _pictures(row: PoolRow, mask: PredictedMask, colours: Sequence[Any], bands: Bands | None) -> list[tuple[Any, ...]]:
    """(width and height, kind, source, description, caption) of each. The kind `confidence` is hidden by the style sheet where a
    page has no box that is ticked for it."""
    assert mask.confidence is not None
    sure = f"mean confidence {mask.confidence.mean() / 255:.3f}"
    size = mask.class_ids.shape[::-1]
    return [
        (
            size,
            "image",
            mask_images.photo(decode_pixels(row.image, MAX_IMAGE_PIXELS, bands)),
            f"Image {row.image_id}",
            "image",
        ),
        (
            size,
            "prediction",
            mask_images.class_picture(mask.class_ids, colours),
            f"Mask of {row.image_id}",
            "pseudo-mask",
        ),
        (size, "certainty", mask_images.confidence_map(mask.confidence), f"Confidence: {sure}", sure),
    ]
