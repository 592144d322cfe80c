"""Parts of a run that lie in another run's folder: a finished stage serves every run that would compute the same.

reused.json    name of a part (stage1, pseudo_masks1, pool.parquet, split.json) → where it lies
"""

from collections.abc import Mapping

from threestage.config import Config, stage_keys
from threestage.data import storage
from threestage.errors import InputError
from threestage.prediction.pseudo_masks import SetMarker
from threestage.run_folder.records import StageInputs

CONFIG_NAME, PAGE_NAME = "config.json", "report.html"
REUSED = "reused.json"


def parts_elsewhere(out: str) -> dict[str, str]:
    uri = storage.join(out, REUSED)
    return dict(storage.read_json(uri, dict[str, str])) if storage.exists(uri) else {}


def resolve_part(out: str, name: str) -> str:
    """Where a part of the run `out` lies."""
    return parts_elsewhere(out).get(name) or storage.join(out, name)


def shared_parts(config: Config, other: str, digests: Mapping[str, str]) -> dict[str, str]:
    """The stages of the run `other`, from the first on, that this one would compute the same, with their pseudo-masks.

    A stage whose pseudo-masks are missing there is the last one shared: this run predicts them into its own folder. Without
    any pseudo-masks, this run finds its own pool too.

    Args:
        digests: of the labelled and validation images.
    Raises:
        InputError: there is no such stage.
    """
    parts: dict[str, str] = {}
    pseudo_masks = None
    pool: dict[str, str] = {}
    for number, stage in enumerate(config.stage_names, 1):
        folder, masks = storage.join(other, stage), storage.join(other, f"pseudo_masks{number}")
        if not storage.exists(storage.join(folder, "done.json")):
            difference: str | None = f"{stage} is not finished there"
        else:
            saved = storage.read_json(storage.join(folder, "inputs.json"), StageInputs)
            wanted = {**digests, "pseudo_masks": pseudo_masks}
            difference = _difference(saved, wanted, stage_keys(config, stage))
        if difference is not None:
            break
        parts[stage] = folder
        done = _usable_set(masks)
        if done is None:
            break
        pool = {"pool.parquet": storage.join(other, "pool.parquet")}
        if config.choosing_after(stage) and not done["statistics"].agreement:
            break
        parts[f"pseudo_masks{number}"] = masks
        pseudo_masks = done["digest"]
    if not parts:
        raise InputError(
            f"--reuse {other}: nothing of it can be used, {difference}; give another run, or none",
            "run/nothing-to-reuse",
        )
    return parts | pool | {"split.json": storage.join(other, "split.json")}


def _usable_set(masks: str) -> SetMarker | None:
    """The marker of a finished set of pseudo-masks whose files are there."""
    marker = storage.join(masks, "done.json")
    done = storage.read_json(marker, SetMarker) if storage.exists(marker) else None
    return None if done is None or done.get("masks_removed") else done


def _difference(saved: StageInputs, wanted: Mapping[str, object], keys: Mapping[str, object]) -> str | None:
    before = saved["keys"]
    for key in sorted({*before, *keys}):
        if before.get(key) != keys.get(key):
            return f"it was made with {key}={before.get(key)!r}, this run has {keys.get(key)!r}"
    return next((f"its {name} differ" for name, digest in wanted.items() if saved.get(name) != digest), None)
