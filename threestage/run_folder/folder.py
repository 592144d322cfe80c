"""A run's folder: the names of its files, the markers of what is done, and what each stage was begun with.

split.json                    which images are labelled and which validate
stage1/inputs.json            what the stage was started with: config keys and digests
stage1/checkpoints …          the stage's own, while it trains
stage1/model/                 model.safetensors, model.json: the weights of the last step
                              calibration.json: for estimates without labels (prediction/estimates.py)
stage1/best_model/            weights and card of the best evaluation, where that is an earlier step
stage1/halfway_model/         of half of its steps; by these the next stage may choose its images (reliable_share)
stage1/image_counts.parquet   pixels of each validation image that the last weights got right, of each class
stage1/result.json            metrics and history
stage1/done.json              the marker, written last
listing/                      of data.unlabelled, where that is a prefix of image files (data/listing.py)
pool.parquet                  the files of the pool; fixed once stage 2 has begun
pseudo_masks1/*.parquet       one file per image file, rejects.parquet, index.parquet, then done.json
continued.json                the run that this one continues (threestage/run/continuation.py)
reused.json                   which of these lie in the folder of another run (reuse.py)
results.json                  the table of all stages, and whether the unlabelled images paid (threestage/verdict.py)
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from threestage.config import Config, StageName, flatten
from threestage.data import storage
from threestage.data.records import Manifest
from threestage.data.rejects import Reject, read_rejects
from threestage.data.split import Split, make_split, saved_split
from threestage.errors import InputError
from threestage.prediction.pseudo_masks import SetMarker
from threestage.run_folder.lineage import DataSet
from threestage.run_folder.records import StageInputs, StageMarker, StageResult
from threestage.run_folder.reuse import REUSED, parts_elsewhere, shared_parts
from threestage.training.checkpoint import Checkpoints, checkpoint_folder


@dataclass(frozen=True)
class RunFolder:
    """`out`: the folder. `reused_parts`: name of a part → where it lies in another run's folder."""

    out: str
    reused_parts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, out: str, reuse: str | None = None) -> "RunFolder":
        """The folder with the parts that it reuses; of a run that begins with `reuse`, its split at first."""
        out = storage.absolute(out)
        parts = parts_elsewhere(out)
        if reuse is not None and not parts:
            parts = {"split.json": storage.join(storage.absolute(reuse), "split.json")}
        return cls(out, parts)

    def part(self, name: str) -> str:
        return self.reused_parts.get(name) or storage.join(self.out, name)

    def is_done(self, part: str) -> bool:
        """Whether a stage or a set of pseudo-masks has its marker. Raises InputError where a reused stage is gone."""
        done = storage.exists(storage.join(self.part(part), "done.json"))
        if not done and part.startswith("stage") and part in self.reused_parts:
            raise InputError(
                f"{storage.join(self.out, REUSED)} names {self.part(part)}, which is gone; give another --out",
                "run/reused-gone",
            )
        return done

    def has_started(self, stage: str) -> bool:
        """Whether a stage has trained so far that other inputs would be mixed with what it has learnt."""
        folder = self.part(stage)
        return (
            storage.exists(storage.join(folder, "done.json"))
            or Checkpoints(checkpoint_folder(folder)).latest() is not None
        )

    def with_reuse(self, config: Config, reuse: str | None, digests: Mapping[str, str]) -> "RunFolder":
        """The folder with the parts of the run `reuse` that this one would compute the same: decided once, then read."""
        parts = parts_elsewhere(self.out)
        if reuse is None or parts:
            return RunFolder(self.out, parts)
        if RunFolder(self.out).has_started("stage1"):
            raise InputError(
                f"--reuse {reuse}: {self.out} has a stage1 of its own; give another --out, or leave --reuse out",
                "run/reuse-too-late",
            )
        parts = shared_parts(config, storage.absolute(reuse), digests)
        storage.write_json(storage.join(self.out, REUSED), parts)
        return RunFolder(self.out, parts)

    def read_or_make_split(self, config: Config, manifest: Manifest, before: Split | None = None) -> Split:
        """The run's split: made once, then read, so that a data set that grows does not change it. `before`: of the run that this
        one continues."""
        uri = self.part("split.json")
        if not storage.exists(uri):
            if "split.json" in self.reused_parts:
                raise InputError(
                    f"{uri} is missing: the run that this one reuses is gone, or is none; correct --reuse",
                    "run/reused-gone",
                )
            return make_split(config.data.root, manifest, config.data, before)
        split, made_with = saved_split(uri)
        now = _split_settings(config)
        _refuse_difference(uri.removesuffix("/split.json"), "split.json", {"data": made_with}, {"data": now})
        return split

    def write_split(self, config: Config, split: Split) -> None:
        record = {"settings": _split_settings(config), "split": split.model_dump(mode="json")}
        storage.write_json(storage.join(self.out, "split.json"), record)

    def verify_or_record_inputs(self, stage: str, inputs: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        """Write down what a stage starts with; raise InputError when it has started with something else."""
        uri = storage.join(self.part(stage), "inputs.json")
        if not self.has_started(stage):
            storage.write_json(uri, inputs)  # nothing was trained with what an earlier try wrote down
            return
        saved = storage.read_json(uri, StageInputs)
        now = json.loads(json.dumps(inputs))
        _refuse_difference(self.out, f"{stage}/inputs.json", saved["keys"], now["keys"])
        for key, what in (
            ("labelled", "labels"),
            ("validation", "validation images"),
            ("pseudo_masks", "pseudo-masks"),
        ):
            if saved[key] != now[key]:
                raise self._other_inputs(stage, what)
        if saved["code_version"] != now["code_version"]:
            warn(f"{stage} was made by threestage {saved['code_version']}, this is {now['code_version']}")

    def refuse_new_targets(self, stage: str, digest: str) -> None:
        """A stage that has trained with other pseudo-masks keeps them: they are not predicted over."""
        inputs = storage.join(self.part(stage), "inputs.json")
        if self.has_started(stage) and storage.read_value(inputs, "pseudo_masks", str | None) != digest:
            raise self._other_inputs(stage, "pseudo-masks")

    def _other_inputs(self, stage: str, what: str) -> InputError:
        folder = self.part(stage)
        return InputError(
            f"{storage.join(folder, 'inputs.json')}: {folder.rsplit('/', 1)[-1]} was trained with other {what} (the data set, "
            "data.max_image_pixels or the stage before has changed, or an older threestage made them): give another --out, set "
            f"it back, or delete {folder} and the stages after it to train them again; what comes before is kept",
            "run/other-inputs",
        )

    def result(self, stage: StageName) -> StageResult:
        return storage.read_json(storage.join(self.part(stage), "result.json"), StageResult)

    def mark_stage(self, stage: StageName, inputs: Mapping[str, Any], data: DataSet) -> None:
        """The stage is done; written last."""
        digest = self.result(stage)["model_digest"]
        marker = {"format": 1, "finished": time.time(), "model_digest": digest, **inputs}
        marker["data"] = data.model_dump(mode="json")
        storage.write_json(storage.join(self.part(stage), "done.json"), marker)

    def finished(self, stage: StageName) -> dict[str, Any]:
        """What result.json of a stage holds, and its `marker`."""
        marker = storage.read_json(storage.join(self.part(stage), "done.json"), StageMarker)
        return {"marker": marker} | dict(self.result(stage))

    def set_digest(self, part: str, stages: Sequence[str] = ()) -> str | None:
        """Of a finished set of pseudo-masks; None before, and where one of `stages` has yet to learn from it but `clean` has
        removed the masks."""
        if not storage.exists(storage.join(self.part(part), "done.json")):
            return None
        found, learner = self.set_marker(part), f"stage{int(part.removeprefix('pseudo_masks')) + 1}"
        if found.get("masks_removed") and learner in stages and not self.is_done(learner):
            return None
        return found["digest"]

    def set_marker(self, part: str) -> SetMarker:
        return storage.read_json(storage.join(self.part(part), "done.json"), SetMarker)

    def rejects(self, stage: str) -> list[Reject]:
        """Images that had a pseudo-mask and could not be used when the stage trained, each once."""
        files = storage.list_files(storage.join(self.part(stage), "rejects"))
        return list({(r.source, r.image_id): r for file in files for r in read_rejects(file)}.values())

    def delete_rejects(self, stage: str) -> None:
        """Those of an earlier try, before a stage begins."""
        folder = self.part(stage)
        storage.delete(storage.join(folder, "rejects"), folder if stage in self.reused_parts else self.out)


def _split_settings(config: Config) -> dict[str, Any]:
    return config.data.model_dump(mode="json", include={"labelled", "split_seed", "validation", "group"})


def _refuse_difference(out: str, where: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    before, now = flatten(before), flatten(now)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        key = changed[0]
        reuse = f" with --reuse {out}, which takes over what stays the same" if where.startswith("stage") else ""
        more = f" (and {len(changed) - 1} more: {', '.join(changed[1:4])})" if len(changed) > 1 else ""
        raise InputError(
            f"{storage.join(out, where)} was made with {key}={before.get(key)!r}, this run has {now.get(key)!r}{more}: "
            f"set it back, or give another --out{reuse}, or delete {storage.join(out, where.split('/')[0])} and what follows it",
            "run/other-settings",
        )
