"""Encoder weights from a file: read without pickle, compared name by name with the encoder, then copied into it."""

import io
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from threestage.data.bands import RGB
from threestage.data.storage import read_bytes
from threestage.errors import InputError

_SHOWN = 3
STATE_DICT = "save its state dict alone with torch.save or safetensors"


def read_encoder_weights(uri: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file (path or URI) by name; InputError if absent, unreadable or pickled."""
    try:
        data = read_bytes(uri)
    except OSError as error:
        raise InputError(
            f"network.weights: cannot read {uri} ({_first_line(error)}); give a path or URI",
            "network/unreadable-weights",
        ) from error
    content: dict[str, Any] = _from_safetensors(uri, data) if uri.endswith(".safetensors") else _from_torch(uri, data)
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if problem := _problem_of(name, value):
            raise InputError(
                f"network.weights: {uri}: the tensor {name!r} {problem}; {STATE_DICT}, with plain tensors",
                "network/odd-weights",
            )
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _problem_of(name: object, value: Tensor) -> str | None:
    """Why a tensor cannot be copied into an encoder, or None."""
    if not isinstance(name, str):
        return f"has a name of type {type(name).__name__}"
    if value.is_meta:
        return "is on the device meta, which holds no values"
    if value.is_quantized or value.is_complex() or value.layout != torch.strided or value.is_nested:
        return f"is a {value.dtype} of layout {value.layout}"
    return None


def parse_safetensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises ValueError where it is none, or of types that torch does not know."""
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(_first_line(error)) from error
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"a type of numbers that torch does not know: {_first_line(error)}") from error


def rename_weights(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state in timm's names: timm's own conversion of the official files of `model`'s family, where it has one."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return dict(convert(state, model))
    except (KeyError, RuntimeError, AttributeError, IndexError):
        return state  # not a file of this family: check_fit says what is wrong


def widen_first_convolution(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of RGB's convolution for the channels of the encoder, by timm's rule: of one channel their sum over RGB; of
    others RGB's over and over, times 3 / channels."""
    from timm.models import adapt_input_conv

    widened = dict(state)
    for name, tensor in wanted.items():
        given = state.get(name)
        if given is None or given.ndim != 4 or tensor.ndim != 4 or given.shape[1] != RGB:
            continue
        if given.shape != tensor.shape and given.shape[::2] == tensor.shape[::2] and given.shape[3] == tensor.shape[3]:
            widened[name] = adapt_input_conv(tensor.shape[1], given)
    return widened


def check_fit(source: str, encoder: str, state: dict[str, Tensor], wanted: dict[str, Tensor], known: set[str]) -> None:
    """Raise InputError unless `state` holds every tensor of `wanted` in its shape and no name outside `known`."""
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    unexpected = [name for name in state if name not in known]
    groups = (("missing", missing), ("of another shape", shapes), ("unexpected", unexpected))
    problems = [f"{len(names)} {kind} ({_some(names)})" for kind, names in groups if names]
    if problems:
        raise InputError(
            f"network.weights: {source} does not fit network.encoder {encoder}: {', '.join(problems)}; "
            "give weights of this encoder in timm's names",
            "network/other-weights",
        )


def copy_weights(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Copy the values, whatever their float type, into the encoder's own tensors."""
    with torch.no_grad():
        for name, tensor in wanted.items():
            if name in state:
                tensor.copy_(state[name])


def _from_safetensors(uri: str, data: bytes) -> dict[str, Any]:
    try:
        return parse_safetensors(data)
    except ValueError as error:
        raise InputError(
            f"network.weights: {uri} is not a safetensors file that can be read ({error}); {STATE_DICT}",
            "network/damaged-weights",
        ) from error


def _from_torch(uri: str, data: bytes) -> dict[str, Any]:
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of strangers end torch's reader in many ways
        raise InputError(
            f"network.weights: {uri} cannot be read as plain tensors ({type(error).__name__}): it is no file of torch.save, or "
            f"holds other objects, which could run code; {STATE_DICT}",
            "network/damaged-weights",
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"network.weights: {uri} holds a {type(content).__name__}, not a state dict; {STATE_DICT}",
            "network/damaged-weights",
        )
    return content


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip()[:200]
