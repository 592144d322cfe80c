"""What a run reads once, before anything is trained: the data set, the split, the labelled and the validation images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from threestage.checks.preflight import check_run
from threestage.config import Config, StageName, stage_keys
from threestage.data.bands import Bands, chosen_bands
from threestage.data.batches import SampleSet
from threestage.data.datasets import labelled_set, static_void_mask, validation_set
from threestage.data.records import Manifest, load_manifest
from threestage.data.split import Split
from threestage.errors import InputError
from threestage.models.network import doubtful_normalisation
from threestage.prediction.champion import PredictPool
from threestage.run.continuation import Continued, keep, with_corrections
from threestage.run_folder.folder import RunFolder
from threestage.run_folder.lineage import DataSet


@dataclass(frozen=True)
class RunContext:
    """`config` has absolute paths. `labelled` and `validation` hold encoded images. `continued`: what `--continue-from` named."""

    config: Config
    manifest: Manifest
    split: Split
    labelled: SampleSet
    validation: SampleSet
    continued: Continued | None = None

    @classmethod
    def resolve(cls, config: Config, folder: RunFolder, continued: Continued | None = None) -> "RunContext":
        """Read it all. Raises InputError when the data set cannot be read, or is not the one that the run began with."""
        config = config.with_absolute_paths()
        root, downscale = config.data.root, config.data.downscale
        manifest = load_manifest(root)
        config = config.for_manifest(manifest)
        bands = chosen_bands(manifest.bands, config.data.bands, root)
        split = folder.read_or_make_split(config, manifest, None if continued is None else continued.split)
        labelled = labelled_set(root, manifest, split, downscale, None, bands)
        validation = validation_set(root, manifest, split, downscale, bands)
        _refuse_missing(root, split, labelled, validation)
        return cls(config, manifest, split, labelled, validation, continued)

    def check(self, warn: Callable[[str], None]) -> list[int]:
        """Pixels of each class in the labelled masks. Raises InputError when the run could not go well."""
        label_pixels = check_run(self.config, self.manifest, self.labelled, self.validation, warn)
        _ = self.static_void  # refuses masks of several sizes
        if warning := doubtful_normalisation(self.config.network):
            warn(warning)
        return label_pixels

    def keys(self, stage: StageName) -> dict[str, Any]:
        """The keys that decide what a stage computes. A stage 1 that starts from another run's champion is another one."""
        more = self.continued.keys if stage == "stage1" and self.continued is not None else {}
        return stage_keys(self.config, stage) | more

    def written_into(self, folder: RunFolder, predict: PredictPool) -> "RunContext":
        """Write down the split, and of a run that continues another the champion and what the annotators corrected of its masks,
        which `predict` makes where they are missing."""
        if self.continued is not None:
            keep(folder, self.continued)
        folder.write_split(self.config, self.split)
        if self.continued is None:
            return self
        classes = self.manifest.classes
        return replace(self, continued=with_corrections(self.continued, folder, self.labelled, classes, predict))

    @property
    def bands(self) -> Bands | None:
        """Those that the network sees; None: 8-bit RGB."""
        return chosen_bands(self.manifest.bands, self.config.data.bands, self.config.data.root)

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
        missing = sorted(set(ids) - set(samples.ids))
        if missing:
            raise InputError(
                f"{root}: {len(missing)} of the run's {len(ids)} {name} images are not in it, {missing[0]} first: "
                "set data.root to the data set that this run began with, or give another --out",
                "run/other-data-set",
            )
