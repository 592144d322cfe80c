"""A run from folders of images and masks: what `threestage train` makes below the run's folder before it trains.

train.json      written first: the folder is a run's (`threestage.data.outputs`)
classes.yaml    the class map, proposed from the masks where none was given; the user may edit it
data/           the data set, with a picture of its labels (`threestage.report.data_set_preview`)
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from threestage.config import Config, load, validated
from threestage.data import storage
from threestage.data.classes import Colour, load_class_map
from threestage.data.formats import IngestSettings
from threestage.data.ingest import IngestReport
from threestage.data.outputs import RUN, TRAIN_MARK, claim, mark
from threestage.data.records import Manifest, load_manifest, pool_files
from threestage.data.split import make_split
from threestage.errors import InputError
from threestage.labels.class_list import class_map_text, format_at

PRESET = "own_images"
CLASSES = "classes.yaml"
LEAVE_OUT = "leave it out: the data set is below --out; use `threestage run` for another"

Ingest = Callable[[str, str, IngestSettings], IngestReport]
"""(source, data set, settings): in this process or on Ray."""


@dataclass(frozen=True)
class OwnImages:
    """Folders or prefixes. `masks`: also the export of a labelling tool; `classes`: a class map, None to propose one in which
    the colours `ignored` are no class; `unlabelled`: more images, None where all are in `images`; `out`: the run's folder."""

    images: str
    masks: str
    out: str
    unlabelled: str | None = None
    classes: str | None = None
    ignored: tuple[Colour, ...] = ()

    @cached_property
    def _format(self) -> str:
        """Of the masks, which are listed once for it."""
        return format_at(self.masks)

    @property
    def data(self) -> str:
        return storage.join(self.out, "data")

    @property
    def has_begun(self) -> bool:
        """Whether stage 1 was started before."""
        return storage.exists(storage.join(self.out, "stage1", "inputs.json"))

    def config(self, name: str, overrides: Sequence[str]) -> Config:
        """The preset on the data set. Raises InputError where `overrides` name another."""
        config = load(PRESET, [*self._settings(name), *overrides])
        if config.data.root != self.data:
            raise InputError(f"--set data.root={config.data.root}: {LEAVE_OUT}", "config/usage")
        return config

    def make_data_set(self, ingest: Ingest) -> list[IngestReport]:
        """Ingest the images; a rerun continues.

        Raises InputError and OSError as `threestage.data.ingest.ingest` does, and InputError where the folder holds
        something else or another class map.
        """
        claim(storage.absolute(self.out), RUN)
        mark(self.out, TRAIN_MARK, "threestage train")
        return [
            ingest(source, self.data, validated(IngestSettings, options))
            for source, options in self._ingests(self._class_map())
        ]

    def commands(self, name: str, overrides: Sequence[str], local: bool) -> list[str]:
        """What `train` stands for, as commands of a shell."""
        lines, here = [], ["--local"] * local
        for source, options in self._ingests(self._class_map()):
            given = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
            lines.append(["ingest", source, self.data, *given, *here])
        settings = [part for setting in [*self._settings(name), *overrides] for part in ("--set", setting)]
        lines += [[command, PRESET, *settings, "--out", self.out, *here] for command in ("check", "run")]
        return [shlex.join(["threestage", *line]) for line in lines]

    def _settings(self, name: str) -> list[str]:
        return [f"name={name}", f"data.root={self.data}"]

    def _ingests(self, class_map: str | None) -> list[tuple[str, dict[str, str]]]:
        """Source and settings of each ingest."""
        labelled = {"format": self._format, "masks": self.masks}
        if class_map is not None:
            labelled["class_map"] = class_map
        found = [(self.images, labelled)]
        if self.unlabelled is not None:
            found.append((self.unlabelled, {"format": "images"}))
        return found

    def _class_map(self) -> str | None:
        """The class map; one is proposed for masks, and none needed for an export, which names its classes."""
        if self.classes is not None or self._format != "folders":
            return self.classes
        uri = storage.join(self.out, CLASSES)
        if not storage.exists(uri):
            storage.write_bytes(uri, class_map_text(self.masks, self.ignored).encode())
        elif not set(self.ignored) <= set(load_class_map(uri).ignore.colours):
            raise InputError(
                f"--ignore: {uri} exists and does not ignore these colours; edit that file, or give another --out",
                "class-map/ignore-too-late",
            )
        return uri


def described(config: Config, device: str) -> list[tuple[str, str]]:
    """What a run has and what it will do, a name and a line each. `device`: where it trains."""
    manifest = load_manifest(config.data.root)
    split = make_split(config.data.root, manifest, config.data)
    images = sum(file.rows for file in pool_files(manifest)) - split.carved
    steps = ", ".join(f"{config.stage(stage).steps:,}" for stage in config.stage_names)
    height, width = config.augment.crop_size
    return [
        ("found", f"{len(split.labelled)} labelled, {len(split.validation)} to validate, {images:,} in the pool"),
        ("classes", f"{len(manifest.classes)}: {', '.join(manifest.classes)}"),
        ("sizes", _sizes(manifest)),
        ("network", f"{config.network.encoder} with {config.network.head}, crops of {height}×{width}, on {device}"),
        ("steps", f"{steps} in {len(config.stage_names)} stages"),
    ]


def _sizes(manifest: Manifest) -> str:
    sizes = manifest.sizes
    return f"{sizes.min_height} to {sizes.max_height} pixels high, {sizes.min_width} to {sizes.max_width} wide"
