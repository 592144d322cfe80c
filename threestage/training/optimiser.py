"""The optimiser of a stage: which parameters take which learning rate and weight decay."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from threestage.errors import InputError
from threestage.models.network import Network
from threestage.models.trunks import VitTrunk
from threestage.training.schedule import OptimiserSettings

UNDECAYED = re.compile(r".*(pos_embed|pos_embed_window|cls_token|reg_token|dist_token|relative_position_bias_table)$")
BLOCK = re.compile(r"(trunk\.vit|last)\.blocks\.(\d+)\.")


def make_optimiser(network: Network, settings: OptimiserSettings) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9, over `parameter_groups`. Their rates stand in "initial_lr" too."""
    groups = parameter_groups(network, settings)
    for group in groups:
        group["initial_lr"] = group["lr"]
    if settings.algorithm == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def parameter_groups(network: Network, settings: OptimiserSettings) -> list[dict[str, Any]]:
    """New layers, then the encoder's: two groups, or one for each layer and decay where the settings part them."""
    if settings.decay_norms and settings.layer_decay == 1:
        return [
            {"params": network.new_parameters(), "lr": settings.learning_rate},
            {"params": network.pretrained_parameters(), "lr": settings.encoder_learning_rate},
        ]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter, rate in _with_rates(network, settings):
        decayed = settings.decay_norms or (parameter.ndim > 1 and not UNDECAYED.match(name))
        groups.setdefault((rate, settings.weight_decay if decayed else 0.0), []).append(parameter)
    return [{"params": held, "lr": rate, "weight_decay": decay} for (rate, decay), held in groups.items()]


def _with_rates(network: Network, settings: OptimiserSettings) -> Iterator[tuple[str, nn.Parameter, float]]:
    encoder = dict(network.encoder.named_parameters())
    inside = {id(parameter) for parameter in encoder.values()}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and id(parameter) not in inside:
            yield name, parameter, settings.learning_rate
    for name, parameter in encoder.items():
        if parameter.requires_grad:
            above = _layers_above(network, name) if settings.layer_decay < 1 else 0
            yield name, parameter, settings.encoder_learning_rate * settings.layer_decay**above


def _layers_above(network: Network, name: str) -> int:
    """Of a ViT with b blocks: 0 for the final norm, 1 for the last block, b + 1 for patches and positions (as BEiT's)."""
    trunk = network.encoder.trunk
    if not isinstance(trunk, VitTrunk):
        raise InputError(
            f"optimiser.layer_decay: {network.settings.encoder!r} is no vision transformer; set optimiser.layer_decay to 1",
            "network/no-transformer",
        )
    early = len(trunk.vit.blocks)
    blocks = early + len(network.encoder.last.blocks)  # type: ignore[arg-type]
    if found := BLOCK.match(name):
        return blocks - int(found[2]) - (early if found[1] == "last" else 0)
    return 0 if name.startswith("last.") else blocks + 1
