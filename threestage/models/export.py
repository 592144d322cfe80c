"""A model as a folder: `model.safetensors` (main network only) beside `model.json` that says how to use it."""

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import safetensors.torch
import torch
from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator
from torch import Tensor, nn

from threestage.data import storage
from threestage.data.bands import RGB, Bands
from threestage.errors import InputError
from threestage.models.network import Network, build_network
from threestage.models.settings import InferenceSettings, NetworkSettings
from threestage.models.traceable import traceable
from threestage.models.weights import parse_safetensors
from threestage.settings import Settings, raised_by

MODEL, BEST_MODEL, HALFWAY_MODEL = "model", "best_model", "halfway_model"
"""Folders of a stage: the weights of its last step, of its best evaluation, of half of its steps."""
WEIGHTS, CARD, PROGRAM = "model.safetensors", "model.json", "program.pt2"
RESTORE = "bring the folder back from a copy, or give another model"
EXPORTED_IMAGES, MOST_SIDE = (1, 4096), 16384  # of an exported program: the least and most images, the longest side
LEAST_SIDES = (33, 65, 129)  # tried in turn: some encoders cannot take smaller maps


Byte = Annotated[int, Field(ge=0, le=255)]


class ModelCard(Settings):
    """What a model's weights do not say. `downscale`: how many times smaller than an image the network's input is.
    `inference`: how images were given to it when it was trained and scored. `bands`: what the numbers of an image mean;
    None: 8-bit RGB."""

    format: Literal[1] = 1
    network: NetworkSettings
    classes: Annotated[tuple[str, ...], Field(min_length=1, max_length=255)]
    colours: Annotated[tuple[tuple[Byte, Byte, Byte], ...], Field(max_length=255)]
    downscale: Annotated[int, Field(ge=1, le=1024)]
    stage: str
    inference: InferenceSettings = InferenceSettings()
    bands: Bands | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The card of a model that sees whole images of RGB is that of the versions that knew nothing else."""
        found: dict[str, Any] = handler(self)
        if self.inference.window is None:
            del found["inference"]
        if self.bands is None:
            del found["bands"]
        if self.network.channels == RGB:
            del found["network"]["channels"]
        return found

    @model_validator(mode="after")
    def _a_channel_per_band(self) -> "ModelCard":
        channels = RGB if self.bands is None else self.bands.channels
        if self.network.channels != channels:
            raise InputError(
                f"a network of {self.network.channels} channels and {channels} bands", "models/damaged-card"
            )
        return self

    @model_validator(mode="after")
    def _a_colour_per_class(self) -> "ModelCard":
        if len(self.colours) != len(self.classes):
            raise InputError(f"{len(self.classes)} classes and {len(self.colours)} colours", "models/damaged-card")
        return self


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
    try:
        _refuse_other_shapes(settings, len(card.classes), weights)
        network = build_network(settings, len(card.classes))
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{where}: {WEIGHTS} does not fit the network of {CARD} ({' '.join(str(error).split())[:200]}…); {RESTORE}",
            "models/other-network",
        ) from None
    return network.eval(), card


def _refuse_other_shapes(settings: NetworkSettings, num_classes: int, weights: Mapping[str, Tensor]) -> None:
    """RuntimeError where the weights are another network's, before memory for this one is taken: a card can ask for any."""
    with torch.device("meta"):
        expected = build_network(settings, num_classes).state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        there, wanted = (tuple(state[name].shape) if name in state else None for state in (weights, expected))
        if there != wanted:
            raise RuntimeError(f"{name} has the shape {there}, in the network {wanted}")


def read_weights(uri: str) -> dict[str, Tensor]:
    """The main network's state in a model folder."""
    return parse_weights(_content(uri, WEIGHTS), uri)


def parse_weights(content: bytes, uri: str) -> dict[str, Tensor]:
    """From the bytes of a model folder's file. Raises InputError, which begins with the folder's URI."""
    try:
        return parse_safetensors(content)
    except ValueError as error:
        raise InputError(f"{uri}: {WEIGHTS} is damaged ({error}); {RESTORE}", "models/damaged-weights") from None


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
                f"{uri}: {CARD} has format {first['input']}, this threestage reads 1; upgrade threestage",
                "models/newer-format",
            ) from None
        place, own = ".".join(map(str, first["loc"])) or "all of it", raised_by(dict(first))
        reason = first["msg"] if own is None else own.message
        raise InputError(f"{uri}: {CARD} is damaged ({place}: {reason}); {RESTORE}", "models/damaged-card") from None


def _content(uri: str, name: str) -> bytes:
    try:
        file = storage.join(uri, name)
        return storage.read_small(file, storage.MAX_JSON_BYTES) if name == CARD else storage.read_bytes(file)
    except FileNotFoundError:
        raise InputError(
            f"{uri}: holds no {name}; give a stage's model folder (…/stage3/model) or models:/NAME@stage3",
            "models/no-model",
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
    """The model of a folder as `program_of` exports it."""
    return program_of(load_model(uri)[0])


def program_of(network: Network) -> bytes:
    """A network in eval mode as a torch.export program: image (N,channels,H,W) float in [0,1] → logits (N,C,H,W), without this
    package.

    Raises what `trace` raises, and ValueError where the program's logits are not the network's.
    """
    traced = trace(network)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(traced.program, content)
    refuse_other_logits(traced.program.module(), network, traced.least_side, 1e-3)
    return content.getvalue()


class Traced(NamedTuple):
    """N is of EXPORTED_IMAGES; sides go from `least_side` up to MOST_SIDE."""

    program: torch.export.ExportedProgram
    least_side: int


def trace(network: Network) -> Traced:
    """A network in eval mode as torch.export traces its main logits, for the first of LEAST_SIDES that it takes.

    Raises whatever torch.export raises.
    """
    for least in LEAST_SIDES[:-1]:
        try:
            return Traced(_exported(network, least), least)
        except torch._dynamo.exc.UserError:  # the network puts other limits on the sides
            continue
    return Traced(_exported(network, LEAST_SIDES[-1]), LEAST_SIDES[-1])


def _exported(network: Network, least_side: int) -> torch.export.ExportedProgram:
    images, height, width = (
        torch.export.Dim(name, min=least, max=most)
        for name, least, most in (
            ("images", *EXPORTED_IMAGES),
            ("height", least_side, MOST_SIDE),
            ("width", least_side, MOST_SIDE),
        )
    )
    with warnings.catch_warnings(), traceable(network):
        warnings.simplefilter("ignore")
        return torch.export.export(
            _MainLogits(network),
            (torch.zeros(2, network.settings.channels, 160, 192),),
            dynamic_shapes=({0: images, 2: height, 3: width},),
            prefer_deferred_runtime_asserts_over_guards=True,
        )


@torch.inference_mode()
def refuse_other_logits(
    exported: Callable[[Tensor], Tensor], network: Network, least_side: int, tolerance: float
) -> None:
    """Raise ValueError unless the exported form gives the network's logits at three sizes, two of which it was not traced with.

    `tolerance`: of a difference, as a share of the largest logit.
    """
    random = torch.Generator().manual_seed(0)
    for number, height, width in ((1, least_side, least_side), (3, least_side + 7, 2 * least_side + 2), (2, 160, 192)):
        image = torch.rand(number, network.settings.channels, height, width, generator=random)
        found, expected = exported(image), network(image)[0]
        allowed = tolerance * float(expected.abs().max())
        if found.shape != expected.shape or not bool(((found - expected).abs() <= allowed).all()):
            raise ValueError(
                f"its logits of {height}x{width} pixels differ from the network's by more than {allowed:.1e}"
            )
