"""Why: moving and renaming code must not change a bit of what a run computes. Runs of 20 steps a stage, with every switch of
the method on and off, against the losses, weights and pseudo-masks recorded in runs.json.

    python -m tests.golden.test_runs --record           # renew runs.json, in a commit of its own that says why figures change
    python -m tests.golden.test_runs --record NAME …    # of these runs alone

Bits are the same only on the same kind of machine with the same libraries. Elsewhere the first losses are compared, with a
tolerance.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.golden.command_line import masks_digest, run_command, settings, this_machine, weights_digest
from threestage.data.synthetic import write_scenes

WEIGHTS = "weights.safetensors"  # stands for the place of the encoder's weights
RECORD = Path(__file__).with_name("runs.json")
SCENES = {"train": 14, "val": 4}
FIRST_STEPS, FIRST_TOLERANCE = 3, 1e-3  # of stage 1, on another machine
LATER_TOLERANCE = 0.3  # of the first step of stages 2 and 3: thresholds enlarge what differs after stage 1

BASE: dict[str, Any] = {
    "name": "golden",
    "data.labelled": 6,
    "network.encoder": "test_resnet", "network.batch_norm": "live", "network.dilations": [1, 2],
    "augment.crop_size": [32, 32], "augment.strong.cutout_size": 8,
    "optimiser.learning_rate": 1e-3, "optimiser.encoder_learning_rate": 1e-3,
    "ema.decay": [[0, 0.9]],
    "pseudo_mask.on_collapse": "ignore",
    "stage1.steps": 20, "stage1.labelled_batch": 2,
    "stage2.steps": 20, "stage2.labelled_batch": 2, "stage2.unlabelled_batch": 2,
    "stage3.steps": 20, "stage3.labelled_batch": 2, "stage3.unlabelled_batch": 2,
    "training.precision": "float32",
    "training.log_every": 1, "training.checkpoint_every": 20, "training.evaluate_every": 10,
}  # fmt: skip

OF_CI = ("all switches off", "many switches on")
QUICK: dict[str, dict[str, Any]] = {
    "all switches off": {},
    "many switches on": {
        "network.head": "deeplabv3plus", "network.head_width": 16,
        "augment.scale": [0.75, 1.25], "augment.class_balance": 0.5,
        "augment.strong.jitter": 0.5, "augment.strong.grey": 0.5, "augment.strong.blur": 0.5,
        "optimiser.learning_rate": 1e-2, "optimiser.encoder_learning_rate": 5e-3,
        "optimiser.schedule": "poly", "optimiser.warm_up_steps": 4, "optimiser.weight_decay": 0.01,
        "ema.warm_up": True,
        "supervised.strong_view": True, "supervised.class_weight": 0.5, "supervised.dice": 0.5,
        "consistency.confidence_threshold": 0.2, "consistency.threshold_rule": "dynamic",
        "consistency.weight_by_confidence": True, "consistency.normaliser": "all", "consistency.ramp_up": 0.5,
        "consistency.cutmix": 0.5, "consistency.strong_views": 2, "consistency.complementary_dropout": True,
        "pseudo_mask.confidence_threshold": 0.2, "pseudo_mask.threshold_rule": "per_class",
        "pseudo_mask.weight_by_confidence": True, "pseudo_mask.normaliser": "all", "pseudo_mask.on_collapse": "warn",
        "stage1.ema": True, "stage1.strong_view": True,
        "stage2.warm_start": True, "stage2.reliable_share": 0.6,
        "stage3.warm_start": True, "stage3.reliable_share": 0.8,
        "stage3.overrides": {"augment": {"class_balance": 0.0}, "consistency": {"cutmix": 0.0}},
        "training.batch_scope": "global",
    },
    "one stage, as UniMatch": {
        "stages": 1, "stage1.unlabelled_batch": 2, "pseudo_mask.final_stage": False,
        "augment.strong.operations": 0, "augment.strong.cutouts": 0, "augment.strong.jitter": 0.8,
        "optimiser.algorithm": "sgd", "optimiser.clip_norm": 1.0,
        "ema.decay": [[0, 0.0]],
        "supervised.hard_share": 0.5,
        "consistency.strong_views": 2, "consistency.feature_dropout": 0.5, "consistency.feature_weight": 0.25,
        "consistency.cutmix": 0.5, "consistency.labelled": False, "consistency.normaliser": "all",
        "consistency.confidence_threshold": 0.2,
        "training.accumulate": 3,
    },
    "plain self-training of a ViT in bfloat16": {
        "stages": 2, "network.encoder": "test_vit", "network.head": "linear", "network.align_corners": False,
        "consistency.weight": 0.0, "pseudo_mask.head": "main", "training.precision": "bfloat16",
    },
}  # fmt: skip

ONE_SWITCH: dict[str, dict[str, Any]] = {
    "random scales": {"augment.scale": [0.5, 1.5], "augment.scale_step": 0.25, "augment.flip_probability": 0.0},
    "class-balanced crops": {"augment.class_balance": 0.5},
    "RandAugment always": {"augment.strong.probability": 1.0, "augment.strong.levels": [5, 10]},
    "jitter": {"augment.strong.jitter": 1.0},
    "grey": {"augment.strong.grey": 1.0},
    "blur": {"augment.strong.blur": 1.0},
    "SGD": {"optimiser.algorithm": "sgd"},
    "weight decay": {"optimiser.weight_decay": 0.1},
    "poly": {"optimiser.schedule": "poly"},
    "learning rate warm-up": {"optimiser.warm_up_steps": 10},
    "clipped gradients": {"optimiser.clip_norm": 0.5},
    "EMA warm-up": {"ema.warm_up": True},
    "EMA by step": {"ema.decay": [[0, 0.5], [10, 0.9]]},
    "strong views of labelled images": {"supervised.strong_view": True},
    "class weights": {"supervised.class_weight": 0.5},
    "hard pixels": {"supervised.hard_share": 0.3},
    "Dice": {"supervised.dice": 0.5, "supervised.weight": 0.25},
    "cutmix": {"consistency.cutmix": 1.0},
    "two strong views": {"consistency.strong_views": 2},
    "feature dropout": {"consistency.feature_dropout": 0.5},
    "feature dropout as a term": {"consistency.feature_dropout": 0.5, "consistency.feature_weight": 0.2},
    "complementary dropout": {"consistency.strong_views": 2, "consistency.complementary_dropout": True},
    "consistency of unlabelled images alone": {"consistency.labelled": False},
    "ramp-up": {"consistency.ramp_up": 0.5},
    "fixed thresholds": {"consistency.confidence_threshold": 0.25, "pseudo_mask.confidence_threshold": 0.25},
    "dynamic thresholds": {
        "consistency.confidence_threshold": 0.9, "consistency.threshold_rule": "dynamic",
        "pseudo_mask.confidence_threshold": 0.9, "pseudo_mask.threshold_rule": "dynamic",
    },
    "thresholds of each class": {
        "consistency.confidence_threshold": 0.25, "consistency.threshold_rule": "per_class",
        "pseudo_mask.confidence_threshold": 0.25, "pseudo_mask.threshold_rule": "per_class",
    },
    "divided by all pixels": {
        "consistency.confidence_threshold": 0.25, "consistency.normaliser": "all",
        "pseudo_mask.confidence_threshold": 0.25, "pseudo_mask.normaliser": "all",
    },
    "weights by confidence": {"consistency.weight_by_confidence": True, "pseudo_mask.weight_by_confidence": True},
    "mean teacher": {"pseudo_mask.weight": 0.0},
    "plain self-training": {"consistency.weight": 0.0, "pseudo_mask.head": "main"},
    "strong view in stage 1": {"stages": 1, "stage1.strong_view": True},
    "EMA in stage 1": {"stages": 1, "stage1.ema": True},
    "pool in stage 1": {"stages": 1, "stage1.unlabelled_batch": 2, "pseudo_mask.final_stage": False},
    "warm start": {"stage2.warm_start": True},
    "reliable images": {"stage2.reliable_share": 0.5},
    "settings of one stage": {"stage2.overrides": {"pseudo_mask": {"weight": 0.5}, "optimiser": {"schedule": "poly"}}},
    "accumulated pieces": {"training.accumulate": 3},
    "global batch": {"training.batch_scope": "global"},
    "scaled learning rate": {"training.learning_rate_rule": "linear"},
    "channels last": {"training.channels_last": True},
    "bfloat16": {"training.precision": "bfloat16"},
    "half size": {"data.downscale": 2},
    "void at fixed pixels": {"data.fixed_void": 0.5},
    "other seeds": {"seed": 3, "data.split_seed": 1},
    "DeepLabV3+": {"network.head": "deeplabv3plus", "network.head_width": 16},
    "frozen batch norm": {
        "network.weights": WEIGHTS, "network.batch_norm": "frozen", "network.output_stride": 16, "network.align_corners": False,
    },
    "ViT": {"network.encoder": "test_vit", "network.head": "linear"},
    "ViT with DPT": {
        "network.encoder": "test_vit", "network.head": "dpt", "network.align_corners": False,
        "optimiser.layer_decay": 0.8, "optimiser.decay_norms": False, "optimiser.weight_decay": 0.05,
    },
}  # fmt: skip
"""Each switch alone in two stages: they show which one has changed."""

RUNS = {**QUICK, **{name: {"stages": 2, **changes} for name, changes in ONE_SWITCH.items()}}

METHOD = (
    "augment",
    "optimiser",
    "ema",
    "supervised",
    "consistency",
    "pseudo_mask",
    "stage1",
    "stage2",
    "stage3",
    "training",
)
SAME_IN_ALL = {
    "augment.crop_size", "augment.strong.cutout_size", "optimiser.learning_rate", "optimiser.encoder_learning_rate",
    "pseudo_mask.batch_size",  # sizes and rates
    "stage1.steps", "stage1.labelled_batch", "stage2.steps", "stage2.labelled_batch", "stage2.unlabelled_batch",
    "stage3.steps", "stage3.labelled_batch", "stage3.unlabelled_batch",
    "training.compile",  # takes minutes
    "training.log_every", "training.checkpoint_every", "training.checkpoints_kept", "training.evaluate_every",
    "training.loss_limit", "training.unsaved_limit_s",  # change no figure
}  # fmt: skip


def make_data(folder: Path) -> Path:
    """A data set of a few synthetic scenes of 64×64, and beside it weights for the encoder."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), folder / WEIGHTS)
    source, root = folder / "source", folder / "data"
    write_scenes(str(source), SCENES, seed=7)  # type: ignore[arg-type]
    run_command(
        "ingest", source, root, "--format", "camvid", "--class-map", source / "class_map.yaml", "--local", "--json"
    )
    return root


def digest_of(data: Path) -> str:
    return str(json.loads((data / "manifest.json").read_text())["digest"])


def computed(name: str, data: Path, out: Path) -> dict[str, Any]:
    """What a run computes, of each of its stages."""
    config = out.with_suffix(".yaml")
    config.write_text("{}")
    chosen = {**BASE, **RUNS[name], "data.root": str(data)}
    chosen = {key: str(data.with_name(WEIGHTS)) if value == WEIGHTS else value for key, value in chosen.items()}
    run_command("run", config, "--local", "--out", out, "--json", *settings(chosen))
    return {stage.name: stage_figures(stage) for stage in sorted(out.glob("stage[123]"))}


def stage_figures(stage: Path) -> dict[str, Any]:
    """Floats are written in hex, one after the other: the losses of every step, the mean IoU of every evaluation."""
    rows = json.loads((stage / "result.json").read_text())["history"]
    names = [name for name in rows[-1] if name.endswith("_loss")] + ["mean_iou"]
    masks = stage.with_name(f"pseudo_masks{stage.name[-1]}")
    return {
        "weights": weights_digest(stage / "model"),
        "pseudo_masks": masks_digest(masks) if masks.exists() else None,
        **{name: " ".join(float(row[name]).hex() for row in rows if name in row) for name in names},
    }


@cache
def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def is_recorded_machine() -> bool:
    return bool(recorded()["machine"] == this_machine())


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """In one line each: what of a run is another value, and of figures by step the first such step."""
    if found.keys() != expected.keys():
        return [f"it has {', '.join(found)}, not {', '.join(expected)}"]
    lines = []
    for stage in expected:
        for name in sorted({*found[stage], *expected[stage]}):
            now, before = found[stage].get(name), expected[stage].get(name)
            if now == before:
                continue
            lines.append(f"{stage} {name}")
            if isinstance(now, str) and isinstance(before, str) and " " in before:
                steps = enumerate(zip(now.split(), before.split(), strict=False), 1)
                number, (one, other) = next((step for step in steps if step[1][0] != step[1][1]), (0, ("0", "0")))
                lines[-1] += f" from value {number} on: {float.fromhex(one):.9g}, recorded {float.fromhex(other):.9g}"
    return lines


def first_losses(figures: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(name, value, relative tolerance) of the losses that machines agree on."""
    for stage, values in figures.items():
        steps, tolerance = (FIRST_STEPS, FIRST_TOLERANCE) if stage == "stage1" else (1, LATER_TOLERANCE)
        for name, text in values.items():
            if name.endswith("_loss"):
                for number, value in enumerate(text.split()[:steps], 1):
                    yield f"{stage} {name} of step {number}", float.fromhex(value), tolerance


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in OF_CI else pytest.mark.slow) for name in RUNS])
def test_a_run_computes_what_it_computed(name: str, data: Path, tmp_path: Path) -> None:
    found, expected = computed(name, data, tmp_path / "run"), recorded()["runs"][name]
    if is_recorded_machine():
        assert not differences(found, expected)
        return
    losses = {name: value for name, value, _ in first_losses(found)}
    for loss, value, tolerance in first_losses(expected):
        assert losses.pop(loss) == pytest.approx(value, rel=tolerance, abs=1e-6), loss
    assert not losses


def test_the_record_names_every_run_and_the_data(data: Path) -> None:
    assert list(recorded()["runs"]) == list(RUNS)
    if is_recorded_machine():
        assert digest_of(data) == recorded()["data"]


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as JSON; `changes` of a stage is one value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value and (not prefix or key == "strong"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value)


def test_every_switch_is_on_in_one_run_and_off_in_another(tmp_path: Path) -> None:
    config = tmp_path / "empty.yaml"
    config.write_text("{}")
    values: dict[str, set[str]] = {}
    for changes in RUNS.values():
        chosen = settings({**BASE, **changes, "data.root": "data"})
        for key, value in flat(json.loads(run_command("config", config, "--json", *chosen))):
            values.setdefault(key, set()).add(value)
    method = {key for key in values if key.split(".")[0] in METHOD}
    assert method >= SAME_IN_ALL
    assert sorted(key for key in method - SAME_IN_ALL if len(values[key]) == 1) == []


def record(names: list[str]) -> None:
    """Renew the record of these runs; without any, of all."""
    torch.set_num_threads(1)
    runs: dict[str, Any] = recorded()["runs"] if names else {}
    assert not names or is_recorded_machine(), "another machine made the record: renew all of it"
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for number, name in enumerate(names or RUNS):
            print(name, flush=True)
            runs[name] = computed(name, data, Path(folder, f"run{number}"))
            found = {
                "machine": this_machine(),
                "data": digest_of(data),
                "runs": {n: runs[n] for n in RUNS if n in runs},
            }
            RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--record", nargs="*", choices=list(RUNS), required=True, metavar="NAME", help="runs; none: all"
    )
    record(parser.parse_args().record)
