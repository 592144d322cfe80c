"""A configuration that is wrong must be refused with the dotted path, the value and the valid choices, in one line."""

from pathlib import Path

import pytest

from tests.conftest import tiny_config
from threestage.config import flatten, load, preset_headers, stage_keys
from threestage.errors import InputError


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "stage1.stps=5",
            "stage1.stps=5: unknown key; did you mean steps? valid here: ema, labelled_batch, steps",
        ),
        ("stage1.steps=abc", "stage1.steps='abc': should be a valid integer"),
        ("network.head=foo", "network.head='foo': should be 'deeplabv2', 'deeplabv3plus' or 'linear'"),
        ("augment.crop_size=[50, 64]", "augment.crop_size=[50, 64]: both sides must be multiples of 8"),
        ("data.labelled=1.5", "data.labelled=1.5: should be a valid integer"),
        ("ema.decay=[[5, 0.9]]", "first steps must rise from 0"),
        ("cluster.workers=[3, 2]", "workers=(3, 2): at least 1, or [least, most]"),
        ("cluster.workers=0", "workers=0: at least 1"),
        ("cluster.workers=many", "cluster.workers='many': should be a valid integer"),
        ("cluster.sync_batch_norm=true", "sync_batch_norm=true needs GPUs"),
        ("cluster.backend=nccl", "backend=nccl needs GPUs"),
        ("cluster.resources_per_worker={GPU: 1}", "give CPU and GPU as cpus_per_worker and gpus_per_worker"),
        ("training.batch=all", "training.batch='all': should be 'per_worker' or 'global'"),
        ("x=1", "x=1: unknown key; valid here: augment, cluster"),
        ("stage1=5", "stage1=5:"),
        ("stage1.steps.more=5", "stage1.steps.more=5"),
        ("nonsense", "write it as a.b=c"),
        ("name=[", "--set name=[: not YAML"),
    ],
)
def test_what_is_wrong_is_named(override: str, expected: str) -> None:
    with pytest.raises(InputError) as refused:
        load("demo", [override])
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_unknown_preset_names_the_presets() -> None:
    with pytest.raises(InputError, match=r"camvd: neither a preset \(.*camvid.*demo.*\) nor a YAML file"):
        load("camvd")


def test_yaml_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {root: here}\naugment: {crop_size: [64, 64]}\n")
    config = load(str(file), ["optimiser.learning_rate=1e-3", "data.labelled=0.25", "name=mine"])
    assert (config.optimiser.learning_rate, config.data.labelled, config.name) == (1e-3, 0.25, "mine")
    file.write_text("- a list\n")
    with pytest.raises(InputError, match="a configuration is a mapping"):
        load(str(file))
    file.write_text("a: [\n")
    with pytest.raises(InputError, match="not YAML"):
        load(str(file))


def test_a_file_lies_over_its_base(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: camvid\nname: mine\ndata: {labelled: 20}\naugment: {crop_size: [64, 64]}\n")
    before, after = (flatten(load(source).model_dump(mode="json")) for source in ("camvid", str(file)))
    assert {key: after[key] for key in after if before[key] != after[key]} == {
        "name": "mine", "data.labelled": 20, "augment.crop_size": [64, 64]
    }  # fmt: skip
    for wrong in ("camvd", "[camvid]", str(file)):
        file.write_text(f"base: {wrong}\n")
        with pytest.raises(InputError, match=r"mine\.yaml: base=.* is no preset; there are best, camvid, "):
            load(str(file))


def test_every_preset_loads_and_says_what_it_is() -> None:
    for name, header in preset_headers().items():
        load(name)
        assert "command:" in header and "cost:" in header, f"{name}: the header names its command and its cost"


def test_workers_are_a_number_or_a_range() -> None:
    fixed, elastic = load("demo", ["cluster.workers=3"]).cluster, load("demo", ["cluster.workers=[2, 5]"]).cluster
    assert (fixed.least_workers, fixed.most_workers, fixed.number_of_predictors) == (3, 3, 3)
    assert (elastic.least_workers, elastic.most_workers, elastic.number_of_predictors) == (2, 5, 5)


def test_keys_that_came_later_count_when_they_are_used(tmp_path: Path) -> None:
    """Runs that began without them go on with their defaults."""
    before = stage_keys(tiny_config(tmp_path), "stage1")
    after = stage_keys(tiny_config(tmp_path, training__batch="global", training__compile=True), "stage1")
    assert {key: after[key] for key in after if before.get(key) != after[key]} == {"training.batch": "global"}


def test_a_stage_depends_on_what_it_computes_with_only(tmp_path: Path) -> None:
    before = tiny_config(tmp_path)
    changed = {
        "cluster__workers": 2, "registry__experiment": "other", "training__log_every": 1, "name": "other",
        "pseudo_mask__guard": "stop", "consistency__weight": 0.5, "stage2__steps": 9, "augment__strong__cutouts": 1,
    }  # fmt: skip
    after = tiny_config(tmp_path, **changed)
    assert stage_keys(before, "stage1") == stage_keys(after, "stage1")
    one, two = stage_keys(before, "stage2"), stage_keys(after, "stage2")
    assert {key for key in one if one[key] != two[key]} == {
        "consistency.weight", "stage2.steps", "augment.strong.cutouts"
    }  # fmt: skip


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
