"""A model as a folder: `model.safetensors` (main network only) beside `model.json` that says how to use it."""

import hashlib
import io
import warnings
from collections.abc import Mapping
from typing import Literal

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from threestage.data import storage
from threestage.errors import InputError
from threestage.models.encoders import replace_pooling
from threestage.models.network import Network, NetworkSettings, build_network
from threestage.settings import Settings

MODEL, BEST_MODEL, HALFWAY_MODEL = "model", "best_model", "halfway_model"
"""Folders of a stage: the weights of its last step, of its best evaluation, of half of its steps."""
WEIGHTS, CARD, PROGRAM = "model.safetensors", "model.json", "program.pt2"
RESTORE = "bring the folder back from a copy, or give another model"
EXPORTED_SIDES, EXPORTED_IMAGES = (33, 16384), (1, 4096)  # the least and the most that an exported program takes


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
    return save_weights(uri, network.main_state_dict(), card)


def save_weights(uri: str, state: Mapping[str, Tensor], card: ModelCard) -> str:
    """As `save_model`, from a main network's state."""
    weights = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in state.items()})
    storage.write_bytes(storage.join(uri, WEIGHTS), weights)
    storage.write_json(storage.join(uri, CARD), card.model_dump(mode="json"))
    return hashlib.sha256(weights).hexdigest()


def load_model(uri: str) -> tuple[Network, ModelCard]:
    """The network in eval mode and its card. InputError where the folder holds no model."""
    return model_of(load_card(uri), read_weights(uri), uri)


def model_of(card: ModelCard, weights: Mapping[str, Tensor], where: str) -> tuple[Network, ModelCard]:
    """The network in eval mode and its card. InputError, which begins with `where`, when they do not fit each other."""
    settings = card.network.model_copy(update={"weights": None, "pretrained": False})
    network = build_network(settings, len(card.classes))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{where}: {WEIGHTS} does not fit the network of {CARD} ({' '.join(str(error).split())[:200]}…): {RESTORE}"
        ) from None
    return network.eval(), card


def read_weights(uri: str) -> dict[str, Tensor]:
    """The main network's state in a model folder."""
    return parse_weights(_content(uri, WEIGHTS), uri)


def parse_weights(content: bytes, uri: str) -> dict[str, Tensor]:
    """From the bytes of a model folder's file. Raises InputError, which begins with the folder's URI."""
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise InputError(f"{uri}: {WEIGHTS} is damaged ({error}): {RESTORE}") from None


def load_card(uri: str) -> ModelCard:
    return parse_card(_content(uri, CARD), uri)


def parse_card(content: bytes, uri: str) -> ModelCard:
    """From the bytes of a model folder's file. Raises InputError, which begins with the folder's URI."""
    try:
        return ModelCard.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",):
            raise InputError(
                f"{uri}: {CARD} has format {first['input']}, this threestage reads 1: upgrade threestage"
            ) from None
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise InputError(f"{uri}: {CARD} is damaged ({place}: {first['msg']}): {RESTORE}") from None


def _content(uri: str, name: str) -> bytes:
    try:
        file = storage.join(uri, name)
        return storage.read_small(file, storage.MAX_JSON_BYTES) if name == CARD else storage.read_bytes(file)
    except FileNotFoundError:
        raise InputError(
            f"{uri} holds no {name}: give a stage's model folder (…/stage3/model) or models:/NAME@stage3"
        ) from None


def start_from(network: Network, uri: str) -> None:
    """Warm start: copy a model's weights into a network, the auxiliary stage as a copy of the last stage again."""
    state = network.state_dict() | read_weights(uri)
    copies = {
        name: name.replace("auxiliary_stage.", "encoder.last.", 1)
        for name in state
        if name.startswith("auxiliary_stage.")
    }
    network.load_state_dict(state | {copy: state[source] for copy, source in copies.items()})


class _MainLogits(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)[0]


def export_program(uri: str) -> bytes:
    """The model of a folder as a torch.export program: image (N,3,H,W) float in [0,1] → logits (N,C,H,W), without this
    package. N and sides: EXPORTED_IMAGES, EXPORTED_SIDES."""
    network, _ = load_model(uri)
    replace_pooling(network)
    images, sides = (
        [torch.export.Dim(name, min=least, max=most) for name in names]
        for names, (least, most) in ((["images"], EXPORTED_IMAGES), (["height", "width"], EXPORTED_SIDES))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            _MainLogits(network),
            (torch.zeros(2, 3, 96, 128),),
            dynamic_shapes=({0: images[0], 2: sides[0], 3: sides[1]},),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        content = io.BytesIO()
        torch.export.save(program, content)
    return content.getvalue()
