"""The supervised models that `threestage suspects` and `threestage forecast` train: stage 1 of a run, with some of its labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from threestage.config import Config, changed
from threestage.data import storage
from threestage.data.records import Manifest, load_manifest
from threestage.data.split import Split, saved_split
from threestage.errors import InputError, Warn
from threestage.run.backend import RunCallbacks
from threestage.run_folder.folder import RunFolder
from threestage.run_folder.reuse import CONFIG_NAME
from threestage.selection.image_lists import Progress


@dataclass(frozen=True)
class Examined:
    """A run, whose labels are examined. `config`: of the models that are trained for it."""

    run: str
    config: Config
    split: Split
    manifest: Manifest

    def split_of(self, labelled: Sequence[str]) -> Split:
        """That of the run, with fewer labels."""
        return self.split.model_copy(update={"labelled": tuple(labelled)})


def examined_run(run: str, address: str | None, steps: int | None) -> Examined:
    """A run, with the settings of a supervised model like its stage 1. Hosts that it names are not asked. Raises InputError where
    the folder holds no run that has begun."""
    uri = storage.join(run, CONFIG_NAME)
    if not storage.exists(uri):
        raise InputError(f"{run}: no run that has begun (no {CONFIG_NAME}); give the folder of one", "run/no-champion")
    config: Config = storage.read_json(uri, Config)
    steps = steps or config.stage1.steps
    changes: dict[str, Any] = {
        "stages": 1,
        "stage1.steps": steps,
        "stage1.unlabelled_batch": 0,
        "data.unlabelled": None,
        "data.exclude": None,
        "pseudo_mask.final_stage": False,
        "training.evaluate_every": steps,
        "storage": {},
        "registry": {},
        "cluster.address": address,
    }
    split = saved_split(RunFolder.at(run).part("split.json"))[0]
    return Examined(run, changed(config, changes), split, load_manifest(config.data.root))


def watched(what: str, steps: int, progress: Progress, warn: Warn) -> RunCallbacks:
    """The callbacks of a run that shows its steps alone."""

    def on_metrics(stage: str, row: Mapping[str, float]) -> None:
        progress(what, int(row["step"]), steps)

    return RunCallbacks(on_metrics=on_metrics, on_warning=warn)
