"""Model folders, weights and programs that somebody else made."""

import importlib
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.bad_inputs import BadInput, refused, threestage

SYMBOL = "Symbol('s6', positive=True, integer=True)"


def _model(folder: Path) -> Path:
    from threestage.models.export import ModelCard, save_model
    from threestage.models.network import build_network
    from threestage.models.settings import NetworkSettings

    settings = NetworkSettings(encoder="test_resnet", head="linear", output_stride=32)
    colours = ((0, 0, 0), (200, 0, 0))
    card = ModelCard(network=settings, classes=("a", "b"), colours=colours, downscale=1, stage="stage3")
    save_model(str(folder / "model"), build_network(settings, 2), card)
    return folder / "model"


def _predict(folder: Path) -> str:
    (folder / "photos").mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "photos/a.png")
    return refused(threestage("predict", folder / "model", folder / "photos", folder / "out", "--local"))


def _card(**changes: Any) -> Callable[[Path], str]:
    def try_it(folder: Path) -> str:
        file = _model(folder) / "model.json"
        card = json.loads(file.read_text())
        for key, value in changes.items():
            (card["network"] if key in card["network"] else card)[key] = value
        file.write_text(json.dumps(card))
        return _predict(folder)

    return try_it


def _brackets(folder: Path) -> str:
    (_model(folder) / "model.json").write_text("[" * 100_000)
    return _predict(folder)


def _unknown_type(folder: Path) -> str:
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (_model(folder) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    return _predict(folder)


def _pth(tensors: dict[Any, torch.Tensor]) -> str:
    from threestage.errors import InputError
    from threestage.models.network import check_settings
    from threestage.models.settings import NetworkSettings

    torch.save(tensors, "weights.pth")
    try:
        check_settings(NetworkSettings(encoder="test_resnet", batch_norm="live", weights="weights.pth"))
    except InputError as error:
        return f"refused [{error.code}]"
    return "accepted"


def packed_model() -> Any:
    """mlflow_sync/packed_model.py, which MLflow warns of when it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("threestage.mlflow_sync.packed_model")


def _program(**strings: Any) -> Callable[[Path], str]:
    def try_it(folder: Path) -> str:
        with zipfile.ZipFile(folder / "program.pt2", "w") as archive:
            for name, content in strings.pop("entries", {}).items():
                archive.writestr(name, content)
            archive.writestr("archive/models/model.json", json.dumps(strings))
        try:
            packed_model()._load_program(folder / "program.pt2", torch.device("cpu"))
        except ValueError as error:
            return "refused" if "program.pt2 holds" in str(error) else str(error)
        return "loaded"

    return try_it


def _floats(folder: Path) -> str:
    try:
        packed_model()._as_bytes(np.zeros((1, 8, 8, 3)).tolist())
    except ValueError as error:
        return "refused" if "whole numbers from 0 to 255" in str(error) else str(error)
    return "accepted"


CODE = "Add.flatten.__globals__['__builtins__']['__import__']('os').system('touch ran') + Integer(1)"
DAMAGED, OTHER = "refused [models/damaged-card]", "refused [models/other-network]"

BAD_INPUTS = [
    BadInput("model.json with a downscale of 0", DAMAGED, _card(downscale=0)),
    BadInput("model.json with a downscale of 10⁹", DAMAGED, _card(downscale=10**9)),
    BadInput("model.json with a head of 10⁶ channels", DAMAGED, _card(head_width=10**6)),
    BadInput("model.json with 5,000 dilations", DAMAGED, _card(dilations=[1] * 5000)),
    BadInput("model.json with a standard deviation of 10⁻³⁰⁰", DAMAGED, _card(std=[1e-300] * 3)),
    BadInput("model.json with no colours", DAMAGED, _card(colours=[])),
    BadInput("model.json with colours out of 0–255", DAMAGED, _card(colours=[[999, -5, 2]] * 2)),
    BadInput("model.json with 1,000,000 classes", DAMAGED, _card(classes=["c"] * 10**6)),
    BadInput("model.json of 100,000 brackets", DAMAGED, _brackets),
    BadInput(
        "model.json that asks for an encoder of a billion weights",
        OTHER,
        _card(encoder="vit_giant_patch14_dinov2"),
    ),
    BadInput(
        "model.safetensors of a number type that torch does not know", "refused [models/damaged-weights]", _unknown_type
    ),
    BadInput(
        "network.weights with a tensor without values (meta)",
        "refused [network/odd-weights]",
        lambda folder: _pth({"conv1.0.weight": torch.empty(24, 3, 3, 3, device="meta")}),
    ),
    BadInput(
        "network.weights with integers for names",
        "refused [network/odd-weights]",
        lambda folder: _pth({7: torch.zeros(1)}),
    ),
    BadInput("program.pt2 whose size expression is code", "refused", _program(sizes=[{"expr_str": CODE}])),
    BadInput("program.pt2 with a name that is code", "refused", _program(nodes=[{"name": "x=print(1)"}])),
    BadInput("program.pt2 whose guard is code", "refused", _program(guards_code=["print(1)"])),
    BadInput("program.pt2 that calls os.system", "refused", _program(nodes=[{"target": "torch.os.system"}])),
    BadInput("program.pt2 that names a module to import", "refused", _program(in_spec='[1, {"__enum__": true}]')),
    BadInput(
        "program.pt2 with a shared library",
        "refused",
        _program(entries={"archive/data/aotinductor/model/a.so": b""}),
    ),
    BadInput(
        "program.pt2 with a pickled object",
        "refused",
        _program(entries={"archive/data/constants/opaque_obj_0": b""}),
    ),
    BadInput("floats in [0,1] sent to a served model", "refused", _floats),
]
