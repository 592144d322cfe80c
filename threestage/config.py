"""The whole configuration: one tree of frozen settings, from a preset or a YAML file plus `--set a.b=c`."""

import math
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from threestage.augment.views import AugmentSettings
from threestage.config_errors import (
    explained,
)
from threestage.data import storage
from threestage.data.bands import RGB, chosen_bands
from threestage.data.records import DataSettings, Manifest
from threestage.data.storage import StorageSettings
from threestage.errors import InputError, did_you_mean
from threestage.hosts import CONFIRMING, host_of, refuse_unconfirmed
from threestage.mlflow_sync.records import RegistrySettings
from threestage.models.network import crop_fits, size_multiple
from threestage.models.settings import InferenceSettings, NetworkSettings
from threestage.prediction.pseudo_masks import PseudoMaskSettings
from threestage.prediction.tta import check_protocol
from threestage.presets import preset_names as preset_names
from threestage.ray_settings import ClusterSettings
from threestage.settings import Settings, current_key, warn_of_old_names, with_current_names
from threestage.training.loop import LoopSettings
from threestage.training.losses import Normaliser, ThresholdRule
from threestage.training.schedule import EmaSettings, OptimiserSettings
from threestage.user_files import read_yaml

StageName = Literal["stage1", "stage2", "stage3"]
Section = Literal["augment", "optimiser", "ema", "supervised", "consistency", "pseudo_mask"]
RUN_ONLY_KEYS = frozenset(
    {"pseudo_mask.on_collapse", "pseudo_mask.batch_size", "pseudo_mask.final_stage"}
)  # not of a stage
Model = TypeVar("Model", bound=BaseModel)
KEYS_ADDED_LATER: dict[str, Any] = {
    "training.batch": "per_worker",
    "training.learning_rate_rule": "none",
    "training.accumulate": 1,
    "augment.class_balance": 0.0,
    "consistency.threshold_rule": "fixed",
    "consistency.weight_by_confidence": False,
    "consistency.strong_views": 1,
    "consistency.feature_dropout": 0.0,
    "consistency.cutmix": 0.0,
    "consistency.complementary_dropout": False,
    "consistency.feature_weight": None,
    "consistency.labelled": True,
    "consistency.normaliser": "kept",
    "pseudo_mask.normaliser": "kept",
    "supervised.strong_view": False,
    "stage1.unlabelled_batch": 0,
    "stage1.ema": False,
    "optimiser.algorithm": "adamw",
    "optimiser.decay_norms": True,
    "optimiser.layer_decay": 1.0,
    "data.bands": None,
    "network.freeze_encoder": False,
    "network.gradient_checkpointing": False,
    "supervised.class_weight": 0.0,
    "supervised.hard_share": 1.0,
    "supervised.dice": 0.0,
    "augment.strong.jitter": 0.0,
    "augment.strong.grey": 0.0,
    "augment.strong.blur": 0.0,
    "ema.warm_up": False,
    "pseudo_mask.threshold_rule": "fixed",
    "pseudo_mask.weight_by_confidence": False,
    "pseudo_mask.head": "auxiliary",
    "stage2.reliable_share": 1.0,
    "stage3.reliable_share": 1.0,
    "inference.window": None,
    "inference.stride": None,
    "inference.overlap": "mean",
}
"""Keys that the first runs did not have, by the names that records have for them, and the value that they continue with."""
RENAMED_KEYS = {
    "pseudo_mask.guard": "pseudo_mask.on_collapse",
    "pseudo_mask.of_last_stage": "pseudo_mask.final_stage",
    "training.batch": "training.batch_scope",
    "stage2.changes": "stage2.overrides",
    "stage3.changes": "stage3.overrides",
}
"""Old names of settings, which are read as the new ones. Digests and records keep the old ones: see `recorded_key`."""
RECORDED_KEYS = {new: old for old, new in RENAMED_KEYS.items()}
TRAINING_KEYS = {"precision", "batch_scope", "learning_rate_rule", "accumulate"}
STAGES: tuple[StageName, ...] = ("stage1", "stage2", "stage3")


class SupervisedSettings(Settings):
    weight: float = Field(0.5, ge=0, description="weight w_sup of the supervised loss in stages 2 and 3")
    strong_view: bool = Field(
        False,
        description="also train stages 2 and 3 on the strong view of labelled images; paper: false",
    )
    class_weight: float = Field(
        0.0, ge=0, le=1, description="weight labelled pixels ∝ (pixels of their class)^-class_weight; paper: 0"
    )
    hard_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each labelled image's pixels to train on, those of highest loss (OHEM)",
    )
    dice: float = Field(0.0, ge=0, description="weight of the soft Dice loss of labelled images; paper: 0")


class ConsistencySettings(Settings):
    weight: float = Field(0.25, ge=0, description="weight w_con of the consistency loss")
    confidence_threshold: float = Field(
        0.0, ge=0, le=1, description="ignore teacher pixels of lower confidence; paper: 0"
    )
    threshold_rule: ThresholdRule = Field(
        "fixed",
        description="factor on the threshold: 1 (fixed; paper), the mean confidence of the batch (dynamic) or of each class",
    )
    weight_by_confidence: bool = Field(False, description="weight each pixel by the teacher's confidence; paper: false")
    ramp_up: float = Field(0.0, ge=0, le=1, description="share of a stage's steps over which w_con rises; paper: 0")
    strong_views: int = Field(1, ge=1, le=2, description="strong views of each unlabelled image in L_con; paper: 1")
    feature_dropout: float = Field(
        0.0, ge=0, lt=1, description="channel dropout of a weak view that L_con also uses; 0: no such view (paper)"
    )
    feature_weight: float | None = Field(
        None, ge=0, description="weight of the feature_dropout view as a separate term; null: part of L_con"
    )
    complementary_dropout: bool = Field(
        False, description="each of two strong views keeps the feature channels that the other drops; paper: false"
    )
    labelled: bool = Field(True, description="compute L_con of labelled images too; paper: true")
    normaliser: Normaliser = Field(
        "kept", description="pixels to divide L_con by: those above the threshold (kept; paper), or all"
    )
    cutmix: float = Field(
        0.0, ge=0, le=1, description="probability that a box of an unlabelled strong view shows another image; paper: 0"
    )


class Stage1Settings(Settings):
    steps: int = Field(20_000, ge=1, description="optimiser steps")
    labelled_batch: int = Field(4, ge=1, description="labelled images per step and worker (training.batch_scope)")
    strong_view: bool = Field(False, description="also train on the strong view (the control of the method)")
    unlabelled_batch: int = Field(
        0,
        ge=0,
        description="unlabelled images per step and worker: one-stage training by consistency on the pool; paper: 0",
    )
    ema: bool = Field(
        False, description="deliver the moving average of the weights, as later stages do (ema.decay); paper: false"
    )
    warm_start: ClassVar[bool] = False
    reliable_share: ClassVar[float] = 1.0
    overrides: ClassVar[dict[str, dict[str, Any]]] = {}

    @property
    def has_teacher(self) -> bool:
        return self.ema or self.unlabelled_batch > 0


class SelfTrainingSettings(Settings):
    steps: int = Field(60_000, ge=1, description="optimiser steps")
    labelled_batch: int = Field(1, ge=1, description="labelled images per step and worker (training.batch_scope)")
    unlabelled_batch: int = Field(4, ge=1, description="unlabelled images per step and worker (training.batch_scope)")
    warm_start: bool = Field(False, description="start from the previous stage's weights; paper: false")
    reliable_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of the pool to train on: the images on which the previous stage agrees most with its half-way weights "
        "(ST++); paper: 1",
    )
    overrides: dict[Section, dict[str, Any]] = Field(
        {}, description="settings of this stage only, e.g. {pseudo_mask: {confidence_threshold: 0.9}}"
    )
    has_teacher: ClassVar[bool] = True


class Config(Settings):
    """Everything that a run depends on."""

    name: str = Field(
        "run",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="name of the run: of its folder runs/NAME, and of the registered model unless registry.model_name is set",
    )
    seed: int = Field(0, description="random seed of networks, batches and augmentation")
    stages: Annotated[int, Field(ge=1, le=3)] = Field(3, description="number of stages to run")
    data: DataSettings
    network: NetworkSettings = NetworkSettings()
    augment: AugmentSettings
    optimiser: OptimiserSettings = OptimiserSettings()
    ema: EmaSettings = EmaSettings()
    supervised: SupervisedSettings = SupervisedSettings()
    consistency: ConsistencySettings = ConsistencySettings()
    pseudo_mask: PseudoMaskSettings = PseudoMaskSettings()
    inference: InferenceSettings = InferenceSettings()
    stage1: Stage1Settings = Stage1Settings()
    stage2: SelfTrainingSettings = SelfTrainingSettings()
    stage3: SelfTrainingSettings = SelfTrainingSettings()
    training: LoopSettings = LoopSettings()
    cluster: ClusterSettings = ClusterSettings()
    storage: StorageSettings = StorageSettings()
    registry: RegistrySettings = RegistrySettings()

    @model_validator(mode="before")
    @classmethod
    def _current_names(cls, tree: Any) -> Any:
        return with_current_names(tree, RENAMED_KEYS)[0] if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _crop_fits(self) -> Self:
        if not crop_fits(self.network, self.augment.crop_size):
            multiple = size_multiple(self.network)
            nearest = [max(1, round(side / multiple)) * multiple for side in self.augment.crop_size]
            raise InputError(
                f"augment.crop_size={list(self.augment.crop_size)}: both sides must be multiples of {multiple} "
                f"for network.encoder={self.network.encoder}; give {nearest}, for example",
                "network/size-multiple",
            )
        check_protocol(self.inference, self.network)
        return self

    @model_validator(mode="after")
    def _finite(self) -> Self:
        for key, value in flatten(self.model_dump(mode="json")).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{key}={value}: should be a finite number", "config/invalid-value")
        return self

    @model_validator(mode="after")
    def _views_fit(self) -> Self:
        views = self.consistency
        if views.complementary_dropout and (
            views.strong_views != 2 or views.feature_dropout or self.training.accumulate > 1
        ):
            raise InputError(
                "consistency.complementary_dropout=true: it needs strong_views=2, feature_dropout=0 and "
                "training.accumulate=1; set these, or leave it out",
                "config/conflict",
            )
        if views.feature_weight is not None and not views.feature_dropout:
            raise InputError(
                f"consistency.feature_weight={views.feature_weight}: it weighs the view of feature_dropout, which is 0; set "
                "consistency.feature_dropout",
                "config/conflict",
            )
        return self

    @model_validator(mode="after")
    def _overrides_fit(self) -> Self:
        for name in STAGES:
            own: Mapping[Any, Any] = self.stage(name).overrides
            for key in sorted(RUN_ONLY_KEYS & set(flatten(dict(own)))):
                raise InputError(
                    f"{name}.overrides: {key} is the same for all stages; set it outside overrides", "config/conflict"
                )
            try:
                self.for_stage(name)
            except ValidationError as error:
                problem = explained(Config, error)
                raise InputError(f"{name}.overrides: {problem.message}", problem.code) from None
        return self

    def for_stage(self, name: StageName) -> "Config":
        """The settings that a stage really has: with its `overrides`."""
        own: Mapping[Any, Any] = self.stage(name).overrides
        if not own:
            return self
        tree = self.model_dump(mode="json")
        tree[name]["overrides"] = {}
        return Config.model_validate(_merged(tree, own))

    def stage(self, name: StageName) -> Stage1Settings | SelfTrainingSettings:
        stages: dict[str, Stage1Settings | SelfTrainingSettings]
        stages = {"stage1": self.stage1, "stage2": self.stage2, "stage3": self.stage3}
        return stages[name]

    def with_absolute_paths(self) -> Self:
        """The same with paths that hold in any process, whatever folder it runs in."""
        unlabelled = self.data.unlabelled and storage.absolute(self.data.unlabelled)
        group = self.data.group if self.data.group_list is None else storage.absolute(self.data.group_list)
        exclude = self.data.exclude and storage.absolute(self.data.exclude)
        places = {
            "root": storage.absolute(self.data.root),
            "unlabelled": unlabelled,
            "group": group,
            "exclude": exclude,
        }
        data = self.data.model_copy(update=places)
        weights = self.network.weights and storage.absolute(self.network.weights)
        return self.model_copy(update={"data": data, "network": self.network.model_copy(update={"weights": weights})})

    def for_manifest(self, manifest: Manifest) -> Self:
        """The same, whose network takes the bands of a data set. Raises InputError where `data.bands` names others."""
        bands = chosen_bands(manifest.bands, self.data.bands, self.data.root)
        channels = RGB if bands is None else bands.channels
        if channels == self.network.channels:
            return self
        return self.model_copy(update={"network": self.network.model_copy(update={"channels": channels})})

    @property
    def stage_names(self) -> tuple[StageName, ...]:
        return STAGES[: self.stages]

    def choosing_after(self, stage: StageName) -> StageName | None:
        """The next stage, if it chooses its images by what this one's weights agree on (`reliable_share`)."""
        later = self.stage_names[self.stage_names.index(stage) + 1 :]
        return later[0] if later and self.stage(later[0]).reliable_share < 1 else None


def recorded_key(key: str) -> str:
    """The name of a dotted key in digests and records."""
    return current_key(key, RECORDED_KEYS)


def stage_keys(config: Config, stage: StageName) -> dict[str, Any]:
    """The dotted keys, with their values, that decide what a stage computes; worker counts, endpoints and names do not."""
    config = config.for_stage(stage)
    sections: set[str] = {"network", "augment", "optimiser", "supervised", "inference", stage}
    sees_pool = config.stage(stage).unlabelled_batch > 0
    if config.stage(stage).has_teacher:
        sections |= {"ema"}
    if sees_pool:
        sections |= {"consistency"}
    if stage != "stage1":
        sections |= {"pseudo_mask"}
    dump = config.model_dump(mode="json", include=sections | {"seed", "data"})
    dump["training"] = config.training.model_dump(mode="json", include=TRAINING_KEYS)
    recorded = {recorded_key(key): value for key, value in flatten(dump).items()}
    keys = {
        key: value for key, value in recorded.items() if key not in KEYS_ADDED_LATER or value != KEYS_ADDED_LATER[key]
    }
    without = {
        "data.root",
        "data.unlabelled",
        "data.exclude",
        "data.max_bad_fraction",
        "data.max_image_pixels",
        "data.labelled",
        "data.split_seed",
        "data.group",
        "data.validation",
        "network.channels",
        *map(recorded_key, RUN_ONLY_KEYS),
    }
    if stage == "stage1":
        without |= {"supervised.strong_view"} if sees_pool else {"supervised.weight", "supervised.strong_view"}
        if not config.stage1.strong_view and not sees_pool:
            without |= {key for key in keys if key.startswith("augment.strong.")}
    return {key: value for key, value in sorted(keys.items()) if key not in without}


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values of some dotted keys. Raises InputError like `load`."""
    tree = config.model_dump(mode="json")
    for path, value in changes.items():
        _put(tree, path, value)
    files = {key: getattr(config, key.partition(".")[0]).host_from for key in CONFIRMING}
    return _with_hosts_from(validated(Config, tree), files, changes)


def _with_hosts_from(config: Config, files: Mapping[str, str | None], given: Collection[str]) -> Config:
    """The configuration that knows which file named each host (dotted key → file); the user has named the keys, or whole
    sections, in `given`."""
    sections = {}
    for key, file in files.items():
        section, _, name = key.partition(".")
        named = getattr(getattr(config, section), name) is not None and not {key, section} & set(given)
        if file is not None and named:
            sections[section] = getattr(config, section).with_host_from(file)
    return config.model_copy(update=sections) if sections else config


def _merged(tree: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the values of a nested mapping in it; sections are merged, values replaced."""
    merged = dict(tree)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def refuse_unconfirmed_hosts(config: Config, on_cluster: bool = False) -> None:
    """Raise InputError for a host that only a file names and that would get credentials, here or `elsewhere`: by a job."""
    for key, uri, file in _hosts(config):
        refuse_unconfirmed(key, uri, file, on_cluster)


def confirmed_hosts(config: Config) -> list[str]:
    """The hosts that a file names, after `refuse_unconfirmed_hosts`."""
    found = [host_of(key, uri) for key, uri, file in _hosts(config) if uri is not None and file is not None]
    return sorted({host for host in found if host is not None})


def _hosts(config: Config) -> list[tuple[str, str | None, str | None]]:
    """Key, value and file of every setting that names a host."""
    sections = {key: getattr(config, key.split(".")[0]) for key in CONFIRMING}
    return [(key, getattr(section, key.split(".")[1]), section.host_from) for key, section in sections.items()]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def preset_headers() -> dict[str, str]:
    """What each preset says of itself: the comment at its head."""
    headers = {}
    for name in preset_names():
        lines = resources.files("threestage.presets").joinpath(f"{name}.yaml").read_text().splitlines()
        headers[name] = "\n".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
    return headers


def load(source: str, overrides: Sequence[str] = ()) -> Config:
    """A configuration from a preset's name or a YAML file, changed by overrides of the form "a.b=c".

    Raises InputError with the dotted path, the value and the valid choices on anything that does not fit.
    """
    tree = _read(source)
    for override in overrides:
        _apply(tree, override)
    file = None if source in preset_names() else source
    return _with_hosts_from(
        validated(Config, tree), dict.fromkeys(CONFIRMING, file), [text.partition("=")[0] for text in overrides]
    )


def validated(model: type[Model], tree: dict[str, Any]) -> Model:
    """`tree` as a model; InputError with one text per key that does not fit."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise explained(model, error) from None


def _read(source: str) -> dict[str, Any]:
    """The tree of a preset or a file; where it has a `base`, laid over the tree of that preset."""
    if source in preset_names():
        text = resources.files("threestage.presets").joinpath(f"{source}.yaml").read_bytes()
    elif (file := storage.path_here(source, "a configuration")).is_file():
        text = file.read_bytes()
    else:
        hint = did_you_mean(source, preset_names())
        raise InputError(
            f"{source}: neither a preset ({', '.join(preset_names())}) nor a YAML file{hint}", "config/not-found"
        )
    tree = read_yaml(text, source)
    if not isinstance(tree, dict):
        raise InputError(
            f"{source}: a configuration is a mapping of sections such as data: and network:", "config/not-a-mapping"
        )
    tree, old_keys = with_current_names(tree, RENAMED_KEYS)
    warn_of_old_names(old_keys, RENAMED_KEYS)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if base not in preset_names():
        hint = did_you_mean(base, preset_names())
        raise InputError(
            f"{source}: base={base!r} is no preset; there are {', '.join(preset_names())}{hint}", "config/unknown-base"
        )
    return _merged(_read(base), tree)


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise InputError(
            f"--set {override}: write it as a.b=c, e.g. --set stage1.steps=1000", "config/not-an-assignment"
        )
    current = current_key(path, RENAMED_KEYS)
    warn_of_old_names([path] if path != current else [], {path: current})
    _put(tree, path, read_yaml(text, f"--set {override}"))


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    path = current_key(path, RENAMED_KEYS)
    *parents, leaf = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise InputError(f"{path}={value!r}: {parent} is a value, not a section", "config/unknown-key")
    tree[leaf] = value
