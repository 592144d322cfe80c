"""Make or extend a data set: list a source, check every file, write immutable Parquet files, publish a manifest last.

The images are cut into shards that are worked on apart from each other (`threestage.data.publish`), in threads here or as
Ray tasks; the process that started the ingest holds figures of shards, not images. A killed ingest leaves the data set
as it was, and the same command, run again, does only the shards that are not finished.

Images are stored in the order of sha256(image_id), those of format images within windows of their listing: a file is
then a fair sample of its split, not one film's neighbouring frames, and shuffling files and a small buffer is enough
for training.

Besides the data set (`threestage.data.records`) the root holds

ingest.json             written first: the folder is a data set's (`threestage.data.outputs`)
rejected/v000N.parquet  the images refused when version N was made or tried (REJECT_SCHEMA); .csv: the same
listing/<digest>/       the listing of a source of format images. It is extended by a later ingest, which then reads only
                        images with new URIs, and those that were replaced in place (other size, time or ETag)
shards/<digest>.json    reports. They stay, for they make an unchanged rerun cheap: a shard whose images and masks the
                        data set holds counts as skipped. Other formats than images are read once more in a rerun (as shards
                        of images that are known), then no more
tiles.csv               of scenes: where each tile lies (`threestage.data.scenes`)
index/                  what the data set holds (`threestage.data.publish`), until an ingest has extended it
unpacked-<digest>/      of a set of Hugging Face: its images and masks, until they are read
drawings-<digest>/      of an export of a labelling tool: what is drawn of each image, until the ingest ends

Parquet files of an ingest that was given up stay too; no manifest names them.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.classes import ClassMap, load_class_map, shipped_class_map
from threestage.data.data_set_checks import (
    FIX,
    LEAST_CLASSES,
    Extent,
    check_class_pixels,
    check_copies,
    fix_for,
    note_other_sizes,
    note_rare_classes,
    sampled_pixels,
)
from threestage.data.drawings import DRAWINGS, write_drawings
from threestage.data.formats import LABELLING_TOOLS, IngestSettings, SourceItem, discover, missing, passed_over
from threestage.data.hugging_face import HUGGING_FACE, unpack_set
from threestage.data.included_classes import INCLUDED, included_class_map
from threestage.data.listing import Each, forget, list_images, suffixes_passed_over
from threestage.data.outputs import DATA_SET, DATA_SET_MARK, claim, mark
from threestage.data.publish import (
    Additions,
    IngestJob,
    Shard,
    ShardReport,
    build_index,
    drawings_uri,
    few_at_once,
    finished,
    look_up_ids,
    next_manifest,
    publish,
    report_uri,
    shard_digest,
    write_shard,
)
from threestage.data.records import MANIFEST_NAME, Manifest, load_manifest
from threestage.data.rejects import Reject, RejectList, csv_uri
from threestage.data.scenes import SCENES, list_tiles, write_tiles
from threestage.errors import InputError
from threestage.labels.labelled_source import LabelledSource, class_of_unlabelled, map_of_classes, proposed_map
from threestage.labels.readers import read_annotations
from threestage.settings import Settings

__all__ = ["IngestReport", "IngestSettings", "Progress", "ingest"]

SHIPPED = ("camvid", "voc", "cityscapes")
LOOKED_UP_AT_ONCE = 2**12
KNOWN_PER_SHARD = 16  # files' worth of images that the data set has: most of them write nothing

Progress = Callable[[int, int], None]


class ClassCount(Settings):
    """Of one class in the masks that an ingest was given: its pixels, and how many images show it."""

    name: str
    pixels: int
    images: int


class IngestReport(Settings):
    """`added_labels`: masks new to the set, of new or of known images. `skipped`: images that it had already.

    `manifest` is the one before when nothing was added. `bad`: how many images were refused; `rejected`: the first of
    them, at most 20; `rejects_uri`: where all are listed, None when none was refused. `labelled`: images with a mask in the
    source, new or not; `class_counts`: what these masks show. `warnings`: what else the user should know, one line each.
    """

    manifest: Manifest
    added_images: int
    added_labels: int
    skipped: int
    bad: int
    rejected: tuple[Reject, ...]
    rejects_uri: str | None
    labelled: int = 0
    class_counts: tuple[ClassCount, ...] = ()
    warnings: tuple[str, ...] = ()


def ingest(
    source: str, root: str, settings: IngestSettings, progress: Progress | None = None, each: Each = few_at_once
) -> IngestReport:
    """Check the images and masks of `source` and add what is new to the data set at `root`, as a new version of it.

    `progress` is called with (images done, images in all) after every shard; `each` runs the shards, in any order. Raises
    InputError when the source does not fit its format or the data set's classes, or more than `max_bad_fraction` of it is bad;
    OSError when a store fails. The data set is then as it was, and a rerun continues.
    """
    root = storage.absolute(root)
    current = _current(root)
    job, plan = _begin(source, root, settings, current, each)
    added, rejects = Additions(), RejectList()
    for report in _reports(job, plan.shards, current, each):
        added.add(report)
        rejects.add(report.rejected)
        if progress:
            progress(added.checked, plan.images)
    made = None
    try:
        _refuse_too_many(job, source, added, plan.images, rejects, settings.max_bad_fraction)
        following = next_manifest(current, job.class_map, settings.name, added)
        warnings = [*plan.notes, *_notes(job, source, plan.items, current, following, added)]
        manifest = publish(root, current, following)
        made = None if manifest is current else manifest
    finally:
        listed = _write_rejects(root, rejects, made)
    plan.delete_used(root, rejects.count, is_index_old=made is not None)
    return IngestReport(
        manifest=manifest,
        added_images=added.images,
        added_labels=added.labels,
        skipped=added.skipped,
        bad=rejects.count,
        rejected=tuple(rejects.first),
        rejects_uri=listed,
        labelled=added.labelled,
        class_counts=_class_counts(manifest, added),
        warnings=tuple(warnings),
    )


def _current(root: str) -> Manifest | None:
    """The manifest that is there. Raises InputError where the folder holds something other than a data set."""
    claim(root, DATA_SET)
    return load_manifest(root) if storage.exists(storage.join(root, MANIFEST_NAME)) else None


def _refuse_too_many(
    job: IngestJob, source: str, added: Additions, images: int, rejects: RejectList, max_bad_fraction: float
) -> None:
    """Raise InputError when more than the share allowed of the images that are there is bad."""
    complaint = rejects.count and rejects.complaint(images - added.gone, max_bad_fraction, _rejects_uri(job.root))
    if complaint:
        forget(_listing_folder(job, source))  # files corrected or deleted now are looked for again
        raise InputError(f"{source}: {complaint}{_unknown_values(job, added)}", "data/bad-images")


def _unknown_values(job: IngestJob, added: Additions) -> str:
    """The end of a complaint: all values that the class map does not know, the commonest first."""
    if not added.unknown:
        return ""
    values = sorted(added.unknown.items(), key=lambda entry: (-entry[1][0], entry[0]))
    listed = ", ".join(f"{value} ({pixels} pixels in {masks} masks)" for value, (pixels, masks) in values)
    return f"; values that class map {job.map_name} does not know: {listed}; add them, or map them to ignore"


def _write_rejects(root: str, rejects: RejectList, made: Manifest | None) -> str | None:
    """Where the bad images are listed; None where there is none, and no list stays."""
    listed = _rejects_uri(root, made)
    if rejects.count == 0:
        for uri in (listed, csv_uri(listed)):
            storage.delete(uri, root)
        return None
    rejects.write_for_people(listed, root)
    return listed


def _rejects_uri(root: str, made: Manifest | None = None) -> str:
    """Where the images are listed that were refused when a version was made, or, without one, when the next was tried: that of
    another ingest, which has published meanwhile, keeps its list."""
    uri = storage.join(root, MANIFEST_NAME)
    there = load_manifest(root).version if made is None and storage.exists(uri) else 0
    return storage.join(root, "rejected", f"v{there + 1 if made is None else made.version:04d}.parquet")


def _class_map(source: str, settings: IngestSettings) -> tuple[ClassMap | None, str]:
    if settings.class_map is not None:
        return load_class_map(settings.class_map), settings.class_map
    if settings.format in SHIPPED:
        return shipped_class_map(settings.format), settings.format
    if settings.format in INCLUDED:
        return included_class_map(settings.format, source)
    if settings.format == "folders" or (settings.format == SCENES and settings.masks is not None):
        raise InputError(
            f"class_map is not given: format {settings.format} needs --class-map FILE, a YAML that says which id or colour is "
            "which class; give it, or --format images for images without masks",
            "class-map/missing",
        )
    return None, ""


def _labels(source: str, settings: IngestSettings, current: Manifest | None) -> LabelledSource:
    """The export of a labelling tool, with the class map that was given, else the data set's classes, else its categories."""
    assert settings.masks is not None
    annotations = read_annotations(settings.format, settings.masks, source)
    if settings.class_map is not None:
        class_map = load_class_map(settings.class_map)
    elif current is not None and current.classes:
        class_map = map_of_classes(current.classes, current.colours)
    else:
        class_map = proposed_map(annotations, settings.unlabelled_pixels)
    return LabelledSource(annotations, class_map, settings.unlabelled_pixels)


def _check_classes(root: str, current: Manifest | None, class_map: ClassMap | None) -> None:
    if current is None or class_map is None or not current.classes:
        return
    names = tuple(entry.name for entry in class_map.classes)
    if names != current.classes:
        theirs = next((pair for pair in zip(names, current.classes, strict=False) if pair[0] != pair[1]), None)
        difference = f"{theirs[0]} in place of {theirs[1]}" if theirs else f"{len(names)}, not {len(current.classes)}"
        raise InputError(
            f"class_map: its classes are not those of the data set {root} ({difference}); correct the map",
            "class-map/other-classes",
        )


def _bands(root: str, asked: int | None, current: Manifest | None) -> int | None:
    """How many each image has; None: 8-bit RGB. Raises InputError where the data set has others."""
    if current is None:
        return asked
    held = None if current.bands is None else current.bands.count
    if asked not in (None, held):
        raise InputError(
            f"bands={asked}: the images of the data set {root} {'are 8-bit RGB' if held is None else f'have {held} bands'}; "
            "make a new data set, or leave it out",
            "data/other-bands",
        )
    return held


# What the user should know of the classes.


def _notes(
    job: IngestJob,
    source: str,
    items: Sequence[SourceItem],
    current: Manifest | None,
    following: Manifest | None,
    added: Additions,
) -> list[str]:
    """Of classes, copies, and what is odd. Raises InputError where the data set would not be one to train on."""
    notes = _class_notes(job, source, items, current, added)
    notes += check_copies(job.root, job.index, current.files if current else (), added.files)
    return notes + _odd(job.root, following or current, current, added)


def _class_notes(
    job: IngestJob, source: str, items: Sequence[SourceItem], current: Manifest | None, added: Additions
) -> list[str]:
    """A note that names classes without a labelled pixel. Raises InputError when fewer than two classes have any."""
    if job.class_map is None or not added.labelled:
        return []
    pixels, seen = added.pixels, f"the {added.labelled} masks of {source}"
    if current is not None and not pixels.all():
        others = sampled_pixels(job.root, current, {item.image_id for item in items if item.mask_uri}, len(pixels))
        seen += " or in a sample of the data set's other masks" if others.any() else ""
        pixels = pixels + others
    names = [entry.name for entry in job.class_map.classes]
    is_fine = pixels.all() and len(pixels) >= LEAST_CLASSES
    fix = FIX if is_fine else fix_for(job.class_map, job.map_name, items)
    note = check_class_pixels(job.root, names, pixels.tolist(), seen, fix)
    return [note] if note else []


def _class_counts(manifest: Manifest, added: Additions) -> tuple[ClassCount, ...]:
    counts = zip(manifest.classes, added.pixels.tolist(), added.class_images.tolist(), strict=False)
    return tuple(ClassCount(name=name, pixels=pixels, images=images) for name, pixels, images in counts)


def _odd(root: str, manifest: Manifest | None, before: Manifest | None, added: Additions) -> list[str]:
    """Notes about rare classes, where the masks are all that the data set has, and about sizes that no label has. `before`:
    without what was added."""
    notes = list[str]()
    if manifest is None:
        return notes
    if added.labelled and added.labelled == sum(counts.labelled for counts in manifest.counts.values()):
        shown = [(one.name, one.pixels, one.images) for one in _class_counts(manifest, added)]
        notes += note_rare_classes(root, shown, added.labelled)
    labelled = _labelled_extent(before, added)
    return notes if labelled is None else [*notes, *note_other_sizes(root, labelled, manifest.sizes)]


def _labelled_extent(before: Manifest | None, added: Additions) -> Extent | None:
    """Of the masks of the source; without any, of the images that the data set had, where some have masks."""
    if added.labelled:
        heights, widths = added.labelled_sizes
        return (heights.smallest, heights.largest), (widths.smallest, widths.largest)
    if before is None or not any(counts.labelled for counts in before.counts.values()):
        return None
    sizes = before.sizes
    return (sizes.min_height, sizes.max_height), (sizes.min_width, sizes.max_width)


# The plan: which images make a shard.


class IngestPlan(NamedTuple):
    """`images`: how many are in all shards. `items`: they themselves, none of a listing. `notes`: for the user. `drawings`: the
    folder of what is drawn of them; `unpacked`: the folder that they lie in, where it is ours."""

    shards: list[Shard]
    images: int
    items: Sequence[SourceItem] = ()
    notes: Sequence[str] = ()
    drawings: str | None = None
    unpacked: str | None = None

    def delete_used(self, root: str, bad: int, is_index_old: bool) -> None:
        """Delete what the ingest made for itself; the user looks at `bad` images in the unpacked folder."""
        index = storage.join(root, "index") if is_index_old else None
        for folder in (index, self.drawings, None if bad else self.unpacked):
            if folder is not None:
                storage.delete(folder, root)


def _begin(
    source: str, root: str, settings: IngestSettings, current: Manifest | None, each: Each
) -> tuple[IngestJob, IngestPlan]:
    """What all shards share, and the shards; the folder is marked as a data set of ours."""
    if not storage.exists(source):
        raise missing(source, "images")
    labels = _labels(source, settings, current) if settings.format in LABELLING_TOOLS else None
    class_map, map_name = _class_map(source, settings) if labels is None else (labels.class_map, settings.masks or "")
    _check_classes(root, current, class_map)
    storage.remove_unfinished(root)
    index = build_index(root, current) if current else None
    base, unlabelled = current.digest if current else None, _unlabelled(settings, class_map)
    bands = _bands(root, settings.bands, current)
    job = IngestJob(root, settings.rows_per_file, class_map, map_name, base, index, unlabelled, bands)
    if current is None and settings.format in ("images", HUGGING_FACE, SCENES):
        mark(root, DATA_SET_MARK, "threestage ingest")  # a listing, or what is unpacked, is written first
    if settings.format == HUGGING_FACE:
        folder = unpack_set(source, root, settings.split)
        plan = _plan(job, folder, settings, each, labels)._replace(unpacked=folder)
    else:
        plan = _plan(job, source, settings, each, labels)
    if current is None:
        mark(root, DATA_SET_MARK, "threestage ingest")
    return job, plan


def _unlabelled(settings: IngestSettings, class_map: ClassMap | None) -> int:
    return IGNORE_INDEX if class_map is None else class_of_unlabelled(settings.unlabelled_pixels, class_map)


def _plan(
    job: IngestJob, source: str, settings: IngestSettings, each: Each, labels: LabelledSource | None
) -> IngestPlan:
    """Sources other than of format images are held in memory."""
    if settings.format == "images":
        return _plan_listed(job, source, settings, each)
    notes: list[str] = []
    label = None if labels is None else partial(labels.label, labelled_before=partial(_labelled_before, job))
    if settings.format == SCENES:
        items, places = list_tiles(source, settings, notes)
        write_tiles(job.root, places)
    else:
        items = discover(source, settings, notes, label)
    items.sort(key=lambda item: (item.split, _order(item.image_id)))
    shards = list(_cut(job, items))
    drawings = None if labels is None else _write_drawings(job.root, shards, labels)
    shards = [replace(shard, drawings=drawings) for shard in shards]
    return IngestPlan(shards, len(items), items, notes, drawings)


def _labelled_before(job: IngestJob, image_ids: Sequence[str]) -> set[str]:
    """Those that have a mask in the data set."""
    return {image_id for image_id, known in look_up_ids(job.index, image_ids).items() if known.mask_digest is not None}


def _write_drawings(root: str, shards: Sequence[Shard], labels: LabelledSource) -> str:
    """The folder of what is drawn of the images of all shards: another ingest into the data set has another one."""
    digest = hashlib.sha256("".join(shard.digest for shard in shards).encode()).hexdigest()[:16]
    folder = storage.join(root, f"{DRAWINGS}-{digest}")
    for shard in shards:
        found = ((item.image_id, labels.drawing_of(item.image_id)) for item in shard.items if item.mask_uri)
        write_drawings(drawings_uri(folder, shard), ((i, data) for i, data in found if data is not None))
    return folder


def _plan_listed(job: IngestJob, source: str, settings: IngestSettings, each: Each) -> IngestPlan:
    folder = _listing_folder(job, source)
    files = list_images(source, folder, job.rows_per_file, each)
    shards = [
        Shard(
            settings.split,
            shard_digest(job, settings.split, f"{file.digest} less {file.replaced}" if file.replaced else file.digest),
            listed=storage.join(folder, file.path),
            replaced=file.replaced,
        )
        for file in files
    ]
    images = sum(file.rows - len(file.replaced) for file in files)
    return IngestPlan(shards, images, notes=passed_over(source, suffixes_passed_over(folder)))


def _listing_folder(job: IngestJob, source: str) -> str:
    name = f"{storage.absolute(source)} {job.rows_per_file}"
    return storage.join(job.root, "listing", hashlib.sha256(name.encode()).hexdigest()[:16])


def _cut(job: IngestJob, items: Sequence[SourceItem]) -> Iterator[Shard]:
    """Shards of one split; new images apart from known ones, so that what is new comes together in few files."""
    known = _known_ids(job, items)
    for of_known in (False, True):
        size = job.rows_per_file * (KNOWN_PER_SHARD if of_known else 1)
        chosen = [item for item in items if (item.image_id in known) == of_known]
        for split, group in groupby(chosen, key=lambda item: item.split):
            members = tuple(group)
            for start in range(0, len(members), size):
                part = members[start : start + size]
                yield Shard(split, shard_digest(job, split, part), items=part)


def _known_ids(job: IngestJob, items: Sequence[SourceItem]) -> set[str]:
    """Those that the data set holds, looked up some at a time: memory is that of their names."""
    known: set[str] = set()
    for start in range(0, len(items), LOOKED_UP_AT_ONCE):
        known |= look_up_ids(job.index, [item.image_id for item in items[start : start + LOOKED_UP_AT_ONCE]]).keys()
    return known


def _order(image_id: str) -> str:
    return hashlib.sha256(image_id.encode()).hexdigest()


# The work, less what is done.


def _reports(job: IngestJob, shards: Sequence[Shard], current: Manifest | None, each: Each) -> Iterator[ShardReport]:
    """The report of every shard in any order: of those that are done first, then as they are done."""
    there = set(storage.list_files(storage.join(job.root, "shards")))
    rest = {shard.digest: shard for shard in shards}
    published = {file.path for file in current.files} if current else set()
    started = [shard for shard in shards if report_uri(job.root, shard.digest) in there]
    for digest, report in each(partial(finished, job), started):
        if valid := _still_valid(report, job.base, published):
            del rest[digest]
            yield valid
    yield from each(partial(write_shard, job), list(rest.values()))


def _still_valid(report: ShardReport | None, base: str | None, published: set[str]) -> ShardReport | None:
    """A report found, as it counts now; None when its shard must be done again.

    What it wrote and the data set does not hold counts only when the manifest is the one that the shard was compared with,
    or when it has none of the shard's images (`finished`): another ingest may have added them since. Masks in the
    manifest's files are not held when others came later (`finished` has asked).
    """
    if report is None:
        return None
    if report.masks is None and all(file.path in published for file in report.files):
        return report.published()
    return report if report.base == base else None
