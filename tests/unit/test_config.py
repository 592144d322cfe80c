"""A configuration that is wrong must be refused with the dotted path, the value and the valid choices, in one line."""

from pathlib import Path

import pytest

from tests.conftest import tiny_config
from tests.refusals import refused
from threestage.config import flatten, load, preset_headers, stage_keys


@pytest.mark.parametrize(
    ("override", "code", "named"),
    [
        ("stage1.stps=5", "config/unknown-key", ["stage1.stps=5:", "steps?", "ema, labelled_batch, steps"]),
        ("stage1.steps=abc", "config/invalid-value", ["stage1.steps='abc':", "integer"]),
        ("network.head=foo", "config/invalid-value", ["network.head='foo':", "'deeplabv2'", "'deeplabv3plus'"]),
        ("augment.crop_size=[50, 64]", "network/size-multiple", ["augment.crop_size=[50, 64]:", 8, [48, 64]]),
        ("data.labelled=1.5", "config/invalid-value", ["data.labelled=1.5:", "integer"]),
        ("ema.decay=[[5, 0.9]]", "config/invalid-value", ["ema=", "[[5, 0.9]]"]),
        ("ema.decay=[[0, 2]]", "config/invalid-value", ["ema", "[0, 1)"]),
        ("optimiser.clip_norm=.inf", "config/invalid-value", ["optimiser.clip_norm=inf:"]),
        ("augment.scale=[2, 1]", "config/invalid-value", ["augment", "(2.0, 1.0)"]),
        ("augment.strong.levels=[3, 11]", "config/invalid-value", ["augment.strong", "(3, 11)"]),
        ("cluster.workers=[3, 2]", "config/invalid-value", ["workers=(3, 2):", "[least, most]"]),
        ("cluster.workers=0", "config/invalid-value", ["workers=0:"]),
        ("cluster.workers=many", "config/invalid-value", ["cluster.workers='many':", "integer"]),
        ("cluster.sync_batch_norm=true", "config/conflict", ["sync_batch_norm=true"]),
        ("cluster.backend=nccl", "config/conflict", ["backend=nccl", "gpus_per_worker"]),
        ("cluster.resources_per_worker={GPU: 1}", "config/conflict", ["cpus_per_worker and gpus_per_worker"]),
        (
            "training.batch_scope=all",
            "config/invalid-value",
            ["training.batch_scope='all':", "'per_worker' or 'global'"],
        ),
        ("x=1", "config/unknown-key", ["x=1:", "augment, cluster"]),
        ("stage1=5", "config/invalid-value", ["stage1=5:"]),
        ("stage1.steps.more=5", "config/unknown-key", ["stage1.steps.more=5", "steps"]),
        ("nonsense", "config/not-an-assignment", ["--set nonsense:", "a.b=c"]),
        ("name=[", "config/not-yaml", ["--set name=[:"]),
    ],
)
def test_what_is_wrong_is_named(override: str, code: str, named: list[object]) -> None:
    with refused(code, *named) as error:
        load("demo", [override])
    assert "\n" not in str(error.value) and str(error.value).count(f" [{code}]") == 1


def test_several_problems_are_one_error(tmp_path: Path) -> None:
    """With their code where they have the same."""
    with refused("config/unknown-key", "stage1.stps=1:", "stage2.stps=2:"):
        load("demo", ["stage1.stps=1", "stage2.stps=2"])
    with refused("config/invalid", "stage1.stps=1:", "stage2.steps='a':") as error:
        load("demo", ["stage1.stps=1", "stage2.steps=a"])
    assert str(error.value).count("[config/") == 1
    (tmp_path / "mine.yaml").write_text("data: {}\n")
    with refused("config/missing-key", "--set data.root=VALUE", "--set augment=VALUE"):
        load(str(tmp_path / "mine.yaml"))


def test_unknown_preset_names_the_presets() -> None:
    with refused("config/not-found", "camvd:", "camvid", "demo"):
        load("camvd")


def test_yaml_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {root: here}\naugment: {crop_size: [64, 64]}\n")
    config = load(str(file), ["optimiser.learning_rate=1e-3", "data.labelled=0.25", "name=mine"])
    assert (config.optimiser.learning_rate, config.data.labelled, config.name) == (1e-3, 0.25, "mine")
    file.write_text("- a list\n")
    with refused("config/not-a-mapping", file):
        load(str(file))
    file.write_text("a: [\n")
    with refused("config/not-yaml", file):
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
        with refused("config/unknown-base", "mine.yaml: base=", "best, camvid, "):
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
    after = stage_keys(tiny_config(tmp_path, training__batch_scope="global", training__compile=True), "stage1")
    assert {key: after[key] for key in after if before.get(key) != after[key]} == {"training.batch": "global"}


def test_a_stage_depends_on_what_it_computes_with_only(tmp_path: Path) -> None:
    before = tiny_config(tmp_path)
    changed = {
        "cluster__workers": 2, "registry__experiment": "other", "training__log_every": 1, "name": "other",
        "pseudo_mask__on_collapse": "stop", "consistency__weight": 0.5, "stage2__steps": 9, "augment__strong__cutouts": 1,
    }  # fmt: skip
    after = tiny_config(tmp_path, **changed)
    assert stage_keys(before, "stage1") == stage_keys(after, "stage1")
    one, two = stage_keys(before, "stage2"), stage_keys(after, "stage2")
    assert {key for key in one if one[key] != two[key]} == {
        "consistency.weight", "stage2.steps", "augment.strong.cutouts"
    }  # fmt: skip


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
