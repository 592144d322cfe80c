"""`--continue-from RUN`: the next round of labelling. A run that starts warm from the champion of RUN, with more labels.

continued.json   in the run's folder: the champion, the rounds before this one, what the annotators corrected; decided once

docs/decisions/008-rounds.md says what of RUN still holds, and what does not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from threestage import IGNORE_INDEX
from threestage.config import Config
from threestage.data import storage
from threestage.data.batches import SampleSet
from threestage.data.pool import pseudo_mask_uri
from threestage.data.records import decode_mask, load_manifest
from threestage.data.split import Split, saved_split
from threestage.errors import InputError
from threestage.models.export import ModelCard
from threestage.prediction.champion import Champion, PredictPool, champion_of, champion_predictions
from threestage.run_folder.folder import RunFolder
from threestage.run_folder.lineage import ContinuedFrom
from threestage.run_folder.records import Results
from threestage.settings import Settings

CONTINUED_NAME = "continued.json"
OTHERWISE_TRAINED = {"weights", "pretrained", "batch_norm", "freeze_encoder", "gradient_checkpointing"}
"""Settings of a network that do not change what its weights mean."""


class Corrections(Settings):
    """What the new labels changed of the champion's pseudo-masks. `images`: those compared. `pixels_changed`: share of their
    labelled pixels. `of_class`: of the pixels that the champion gave a class, the share that has another one now; None where
    it gave none."""

    images: int
    pixels_changed: float | None
    of_class: dict[str, float | None]


class Round(Settings):
    """A run among those that follow each other. `mean_iou`: of its champion, on its validation images; `corrected`: None of the
    first round."""

    run: str
    data_version: int
    labelled: int
    stage: str
    mean_iou: float
    corrected: Corrections | None = None


class Continued(Settings):
    """`rounds`: those before this one. `split`: of the run that is continued."""

    champion: ContinuedFrom
    split: Split
    rounds: tuple[Round, ...]
    corrected: Corrections | None = None

    @property
    def keys(self) -> dict[str, str]:
        """Among the keys that decide what stage 1 computes."""
        return {"continue_from": self.champion.model_digest}

    def tags(self) -> dict[str, str]:
        found = {"round": str(len(self.rounds) + 1), "continued_from": self.champion.run}
        found["continued_from_digest"] = self.champion.model_digest
        if self.corrected is not None and self.corrected.pixels_changed is not None:
            found["pixels_changed"] = f"{self.corrected.pixels_changed:.4f}"
        return found

    def results(self, this: Round) -> dict[str, Any]:
        """What results.json holds beside the others' keys."""
        rounds = [*self.rounds, this.model_copy(update={"corrected": self.corrected})]
        return {
            "continued_from": self.champion.model_dump(mode="json"),
            "rounds": [one.model_dump(mode="json") for one in rounds],
        }


def read_or_begin(folder: RunFolder, config: Config, run: str | None, reuse: str | None = None) -> Continued | None:
    """What the run in `folder` continues; of a run that begins now, the champion of `run`, which `keep` writes down.

    Raises InputError where `run` has no champion or is not finished, where its network or classes are others, and beside `reuse`.
    """
    if run is not None and reuse is not None:
        raise InputError(
            f"--continue-from {run}: not with --reuse, whose stage 1 began otherwise; leave one of them out",
            "config/usage",
        )
    uri = storage.join(folder.out, CONTINUED_NAME)
    saved: Continued | None = storage.read_json(uri, Continued) if storage.exists(uri) else None
    if run is None:
        return saved
    run = storage.absolute(run)
    if saved is not None and saved.champion.run != run:
        raise InputError(
            f"--continue-from {run}: {folder.out} continues {saved.champion.run}; leave it out, or give another --out",
            "run/continues-another",
        )
    if saved is not None:
        return saved
    if folder.has_started("stage1"):
        raise InputError(
            f"--continue-from {run}: {folder.out} has a stage1 of its own; give another --out", "run/continue-too-late"
        )
    champion = champion_of(run)
    _refuse_other_model(run, champion.card, config)
    return _from_champion(run, champion)


def _from_champion(run: str, champion: Champion) -> Continued:
    uri = storage.join(run, "results.json")
    if not storage.exists(uri):
        raise InputError(f"--continue-from {run}: the run is not finished; finish it first", "run/not-finished")
    results: Mapping[str, Any] = storage.read_json(uri, Results)
    rounds = tuple(Round.model_validate(one) for one in results.get("rounds", ()))
    made = ContinuedFrom(
        run=run,
        stage=champion.stage,
        model_digest=champion.run.result(champion.stage)["model_digest"],
        model=champion.model,
    )
    split = saved_split(champion.run.part("split.json"))[0]
    return Continued(champion=made, split=split, rounds=rounds or (round_of(run, champion.stage, results),))


def round_of(run: str, stage: str, results: Mapping[str, Any]) -> Round:
    """The round that results.json tells of."""
    data = results["data"]
    score = results["stages"][stage]["mean_iou"]
    return Round(run=run, data_version=data["version"], labelled=data["labelled"], stage=stage, mean_iou=score)


def _refuse_other_model(run: str, card: ModelCard, config: Config) -> None:
    manifest = load_manifest(config.data.root)
    config = config.for_manifest(manifest)
    before, now = (
        network.model_dump(mode="json", exclude=OTHERWISE_TRAINED) for network in (card.network, config.network)
    )
    for key, value in before.items():
        if now[key] != value:
            raise InputError(
                f"--continue-from {run}: its champion has network.{key}={value}, this run has {now[key]}; set it to that",
                "run/continue-other-model",
            )
    classes = manifest.classes
    if classes != card.classes:
        raise InputError(
            f"--continue-from {run}: its champion knows the classes {', '.join(card.classes)}, {config.data.root} has "
            f"{', '.join(classes)}; leave --continue-from out",
            "run/continue-other-model",
        )


def keep(folder: RunFolder, continued: Continued) -> None:
    storage.write_json(storage.join(folder.out, CONTINUED_NAME), continued.model_dump(mode="json"))


def with_corrections(
    continued: Continued, folder: RunFolder, labelled: SampleSet, classes: Sequence[str], predict: PredictPool
) -> Continued:
    """With what the new labels changed of the champion's masks of the same images, which `predict` makes where RUN has none.

    `labelled`: the labelled images of this run. Kept once it is measured.
    """
    if continued.corrected is not None:
        return continued
    before = {*continued.split.labelled, *continued.split.validation}
    new = {image_id: n for n, image_id in enumerate(labelled.ids) if image_id not in before}
    counts, images = np.zeros((len(classes), len(classes)), np.int64), 0
    predictions = champion_predictions(champion_of(continued.champion.run), folder.out, frozenset(new), predict)
    for file in predictions.files:
        for row in storage.read_rows(pseudo_mask_uri(predictions.folder, file), "image_id", new).to_pylist():
            predicted = None if row["pseudo_mask"] is None else decode_mask(row["pseudo_mask"])
            mask = labelled.decoded(new[row["image_id"]]).maps["mask"]
            if predicted is not None and predicted.shape == mask.shape:
                known = (predicted != IGNORE_INDEX) & (mask != IGNORE_INDEX)
                pairs = predicted[known].astype(np.int64) * len(classes) + mask[known]
                counts += np.bincount(pairs, minlength=counts.size).reshape(counts.shape)
                images += 1
    found = continued.model_copy(update={"corrected": _corrections(counts, images, classes)})
    keep(folder, found)
    return found


def _corrections(counts: np.ndarray, images: int, classes: Sequence[str]) -> Corrections:
    """`counts`: (C,C), rows predicted, columns corrected."""
    given, kept = counts.sum(1), counts.diagonal()
    shares = {name: float(1 - kept[n] / given[n]) if given[n] else None for n, name in enumerate(classes)}
    changed = float(1 - kept.sum() / given.sum()) if given.sum() else None
    return Corrections(images=images, pixels_changed=changed, of_class=shares)
