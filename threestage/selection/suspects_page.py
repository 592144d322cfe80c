"""suspects.html: suspect labels beside what a model says that has not learnt them."""

from collections.abc import Mapping, Sequence
from typing import Any

from threestage.data import storage
from threestage.data.batches import SampleSet
from threestage.data.records import DataSettings, Manifest, labelled_rows
from threestage.data.samples import TableSamples
from threestage.report import mask_images
from threestage.report.report import render_page
from threestage.selection.contradictions import contradicted_only
from threestage.selection.held_out import LABELLED_SPLITS, Bytes, HeldOut, read_held_out
from threestage.selection.selection_page import MOST_PICTURES

PAGE, TEMPLATE = "suspects.html", "suspects.html.j2"


def write_suspects_page(
    out: str, done: Mapping[str, Any], uris: Sequence[str], manifest: Manifest, data: DataSettings
) -> None:
    """`done`: what suspects.json holds; `uris`: files of predictions."""
    colours = mask_images.class_colours(manifest.colours)
    images: Sequence[Mapping[str, Any]] = done["images"][:MOST_PICTURES]
    shown = frozenset(image["image_id"] for image in images)
    photos = dict[str, Bytes]()
    for split in LABELLED_SPLITS:
        rows = labelled_rows(data.root, manifest, split, shown)
        samples = SampleSet(TableSamples(rows), data.downscale, bands=manifest.bands)
        photos |= {image_id: samples.decoded(number).image for number, image_id in enumerate(samples.ids)}
    pictures = {
        image.image_id: _pictures(image, photos[image.image_id], colours)
        for image in read_held_out(uris, shown)
        if image.image_id in photos
    }
    page = render_page(
        TEMPLATE,
        "suspects",
        title=f"{len(images)} suspect labels",
        intro=f"The most suspect of {done['examined']:,} labelled images of {done['run']}.",
        classes=list(zip(manifest.classes, colours, strict=True)),
        images=[(image, pictures.get(image["image_id"], ())) for image in images],
        not_shown=len(done["images"]) - len(images),
    )
    storage.write_bytes(storage.join(out, PAGE), page.encode("utf-8", "replace"))


def _pictures(image: HeldOut, photo: Bytes, colours: Sequence[Any]) -> list[tuple[Any, ...]]:
    """(width and height, kind, source, description, caption) of each."""
    size, name = image.mask.shape[::-1], image.image_id
    maps = (
        ("mask", image.mask, "label"),
        ("prediction", image.class_ids, "model"),
        ("contradicted", contradicted_only(image), "where it contradicts"),
    )
    return [
        (size, "image", mask_images.photo(photo), f"Image {name}", "image"),
        *(
            (size, kind, mask_images.class_picture(class_ids, colours), f"{caption} of {name}", caption)
            for kind, class_ids, caption in maps
        ),
    ]
