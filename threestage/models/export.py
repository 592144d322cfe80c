"""A model as a folder: `model.safetensors` (main network only) beside `model.json` that says how to use it."""

import hashlib
from typing import Literal

import safetensors.torch
from torch import Tensor

from threestage.data import storage
from threestage.errors import InputError
from threestage.models.network import Network, NetworkSettings, build_network
from threestage.settings import Settings

WEIGHTS, CARD = "model.safetensors", "model.json"


class ModelCard(Settings):
    """What a model's weights do not say."""

    format: Literal[1] = 1
    network: NetworkSettings
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    downscale: int
    stage: str


def save_model(uri: str, network: Network, card: ModelCard) -> str:
    """Write the folder; returns the weights' sha256, by which pseudo-masks and registry name the model."""
    state = {name: tensor.contiguous().cpu() for name, tensor in network.main_state_dict().items()}
    weights = safetensors.torch.save(state)
    storage.write_bytes(storage.join(uri, WEIGHTS), weights)
    storage.write_json(storage.join(uri, CARD), card.model_dump(mode="json"))
    return hashlib.sha256(weights).hexdigest()


def load_model(uri: str) -> tuple[Network, ModelCard]:
    """The network in eval mode and its card. InputError where the folder holds no model."""
    card = load_card(uri)
    settings = card.network.model_copy(update={"weights": None, "pretrained": False})
    network = build_network(settings, len(card.classes))
    network.load_state_dict(read_weights(uri))
    return network.eval(), card


def read_weights(uri: str) -> dict[str, Tensor]:
    """The main network's state in a model folder."""
    return safetensors.torch.load(storage.read_bytes(storage.join(uri, WEIGHTS)))


def load_card(uri: str) -> ModelCard:
    path = storage.join(uri, CARD)
    if not storage.exists(path):
        raise InputError(f"{uri} holds no {CARD}: give a stage's model folder (…/stage3/model) or models:/NAME@stage3")
    return ModelCard.model_validate(storage.read_json(path))


def start_from(network: Network, uri: str) -> None:
    """Warm start: copy a model's weights into a network, the auxiliary stage as a copy of the last stage again."""
    state = network.state_dict() | read_weights(uri)
    copies = {
        name: name.replace("auxiliary_stage.", "encoder.last.", 1)
        for name in state
        if name.startswith("auxiliary_stage.")
    }
    network.load_state_dict(state | {copy: state[source] for copy, source in copies.items()})
