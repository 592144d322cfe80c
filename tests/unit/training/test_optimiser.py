"""Why: a wrong rate or decay of one layer trains without a word, and worse."""

from typing import Any

import pytest

from tests.refusals import refused
from threestage.models.network import Network, build_network
from threestage.models.settings import NetworkSettings
from threestage.training.optimiser import make_optimiser, parameter_groups
from threestage.training.schedule import OptimiserSettings


def network(encoder: str = "test_vit", **values: Any) -> Network:
    head = "dpt" if encoder == "test_vit" else "linear"
    return build_network(NetworkSettings(encoder=encoder, head=head, batch_norm="live", **values), 3, "branch")


def by_name(built: Network, **values: Any) -> dict[str, tuple[float, float]]:
    """Rate and weight decay of every parameter that is trained."""
    optimiser = make_optimiser(built, OptimiserSettings(**{"learning_rate": 1, "encoder_learning_rate": 0.5, **values}))
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    groups = [(group, parameter) for group in optimiser.param_groups for parameter in group["params"]]
    assert len(groups) == len({id(parameter) for _, parameter in groups}), "each parameter once"
    assert all(group["lr"] == group["initial_lr"] for group, _ in groups)
    return {names[id(parameter)]: (group["lr"], group["weight_decay"]) for group, parameter in groups}


def test_each_layer_has_its_rate() -> None:
    """test_vit has six blocks, of which the last stage holds one."""
    rates = {name: rate for name, (rate, _) in by_name(network(), layer_decay=0.5).items()}
    expected = {
        "main_head.classifier.weight": 1,
        "auxiliary_stage.blocks.0.mlp.fc1.weight": 1,
        "encoder.last.norm.weight": 0.5,
        "encoder.last.blocks.0.mlp.fc1.weight": 0.5 * 0.5,
        "encoder.trunk.vit.blocks.4.mlp.fc1.weight": 0.5 * 0.5**2,
        "encoder.trunk.vit.blocks.0.mlp.fc1.weight": 0.5 * 0.5**6,
        "encoder.trunk.vit.pos_embed": 0.5 * 0.5**7,
        "encoder.trunk.vit.patch_embed.proj.weight": 0.5 * 0.5**7,
    }
    assert {name: rates[name] for name in expected} == pytest.approx(expected)


def test_norms_biases_and_positions_are_not_decayed() -> None:
    decays = {name: decay for name, (_, decay) in by_name(network(), decay_norms=False, weight_decay=0.1).items()}
    free = {name for name, decay in decays.items() if decay == 0}
    vit = "encoder.trunk.vit."
    assert {f"{vit}pos_embed", f"{vit}cls_token", f"{vit}blocks.0.norm1.weight", "main_head.classifier.bias"} <= free
    assert {f"{vit}blocks.0.attn.qkv.weight", f"{vit}patch_embed.proj.weight", "main_head.refine.weight"}.isdisjoint(
        free
    )
    assert set(decays.values()) == {0, 0.1}


def test_plain_settings_make_two_groups_and_a_frozen_encoder_none_of_its_own() -> None:
    built, settings = network("test_resnet"), OptimiserSettings()
    assert [group["lr"] for group in parameter_groups(built, settings)] == [3e-5, 3e-6]
    assert not parameter_groups(network(freeze_encoder=True), settings)[1]["params"]
    assert make_optimiser(network(freeze_encoder=True), settings)


def test_layer_decay_is_a_vits() -> None:
    with refused("network/no-transformer", "optimiser.layer_decay", "'test_resnet'"):
        by_name(network("test_resnet"), layer_decay=0.9)
