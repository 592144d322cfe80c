"""What a run reads once, before anything is trained: the data set, the split, the labelled and the validation images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from threestage.checks.preflight import check_run
from threestage.config import Config
from threestage.data.batches import SampleSet
from threestage.data.datasets import labelled_set, static_void_mask, validation_set
from threestage.data.records import Manifest, load_manifest
from threestage.data.split import Split
from threestage.errors import InputError
from threestage.models.network import doubtful_normalisation
from threestage.run_folder.folder import RunFolder
from threestage.run_folder.lineage import DataSet


@dataclass(frozen=True)
class RunContext:
    """`config` has absolute paths. `labelled` and `validation` hold encoded images."""

    config: Config
    manifest: Manifest
    split: Split
    labelled: SampleSet
    validation: SampleSet

    @classmethod
    def resolve(cls, config: Config, folder: RunFolder) -> "RunContext":
        """Read it all. Raises InputError when the data set cannot be read, or is not the one that the run began with."""
        config = config.with_absolute_paths()
        root, downscale = config.data.root, config.data.downscale
        manifest = load_manifest(root)
        split = folder.read_or_make_split(config, manifest)
        labelled = labelled_set(root, manifest, split, downscale, None)
        validation = validation_set(root, manifest, split, downscale)
        _refuse_missing(root, split, labelled, validation)
        return cls(config, manifest, split, labelled, validation)

    def check(self, warn: Callable[[str], None]) -> list[int]:
        """Pixels of each class in the labelled masks. Raises InputError when the run could not go well."""
        label_pixels = check_run(self.config, self.manifest, self.labelled, self.validation, warn)
        _ = self.static_void  # refuses masks of several sizes
        if warning := doubtful_normalisation(self.config.network):
            warn(warning)
        return label_pixels

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of the labelled and of the validation images, masks included."""
        return {"labelled": self.labelled.digest(), "validation": self.validation.digest()}

    @cached_property
    def static_void(self) -> str | None:
        """The mask of pixels that are void in most labelled images, if the settings ask for it."""
        share = self.config.data.fixed_void
        return None if share is None else static_void_mask(self.labelled, share)

    def data_set(self) -> DataSet:
        root, manifest = self.config.data.root, self.manifest
        name = manifest.name or root.rstrip("/").rpartition("/")[2]
        return DataSet(root=root, name=name, version=manifest.version, digest=manifest.digest)


def _refuse_missing(root: str, split: Split, labelled: SampleSet, validation: SampleSet) -> None:
    """A split that names images which the data set does not hold belongs to another data set."""
    for name, ids, samples in (("labelled", split.labelled, labelled), ("validation", split.validation, validation)):
        missing = sorted(set(ids) - {sample.image_id for sample in samples.samples})
        if missing:
            raise InputError(
                f"{root}: {len(missing)} of the run's {len(ids)} {name} images are not in it, {missing[0]} first: "
                "set data.root to the data set that this run began with, or give another --out",
                "run/other-data-set",
            )
