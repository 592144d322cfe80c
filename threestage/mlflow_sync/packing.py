"""A model as MLflow keeps it: packed_model.py as its code, and one folder that needs neither MLflow nor this package.

model/artifacts/model/
    model.safetensors, model.json    the weights, and how to build the network (threestage.models.export)
    calibration.json                 for estimates without labels (threestage.prediction.estimates)
    program.pt2                      the network as a torch.export program: RGB in [0,1] (N,3,H,W) → logits (N,C,H,W);
                                     left out where torch.export cannot take the network
    lineage.json                     where it comes from (threestage.run_folder.lineage)
    README.md                        the model card, from model_card.md.j2
"""

import hashlib
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np

from threestage.data.bands import MOST
from threestage.mlflow_sync.connection import redact, redact_tree
from threestage.mlflow_sync.model_registry import CALIBRATION, CARD, PACKED_FOLDER
from threestage.mlflow_sync.promotion import CHAMPION
from threestage.mlflow_sync.records import StageRecord
from threestage.models.export import PROGRAM, ModelCard
from threestage.models.program import least_side, write_program
from threestage.models.settings import NetworkSettings
from threestage.plain_text import markdown, one_line
from threestage.prediction.estimates import Calibration
from threestage.run_folder.lineage import Lineage, short_digest
from threestage.training.metrics import MEAN_IOU_RULE

LINEAGE_NAME, CARD_NAME = "lineage.json", "README.md"
EXAMPLE_SIZE = (64, 96)
_failed: dict[tuple[NetworkSettings, int], str] = {}
"""By network and classes, why it has no program: a failed export is not tried again in this process."""


class Packed(NamedTuple):
    """`digests`: SHA-256 of every file by its path in the packed model; `no_program`: why it has none, or None;
    `validation_drift`: see `Calibration`, None of a model without one."""

    digests: dict[str, str]
    no_program: str | None
    validation_drift: float | None


def pack_model(files: Mapping[str, bytes], destination: Path, record: StageRecord, name: str) -> Packed:
    """Write an MLflow model at `destination` from the files of a model's folder. `name`: that it is registered under."""
    import mlflow.pyfunc

    lineage, card, drift = redact_tree(record.lineage), ModelCard.model_validate_json(files[CARD]), None
    if CALIBRATION in files:
        drift = Calibration.parse(files[CALIBRATION], record.model_dir, len(card.classes)).validation_drift
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, PACKED_FOLDER)
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        no_program = _write_program(folder, card)
        least = None if no_program else least_side(folder / PROGRAM)
        (folder / LINEAGE_NAME).write_text(json.dumps(lineage, indent=1))
        (folder / CARD_NAME).write_text(write_card(name, card, record, least, no_program))
        mlflow.pyfunc.save_model(
            path=str(destination),
            python_model=str(Path(__file__).with_name("packed_model.py")),
            artifacts={"model": str(folder)},
            pip_requirements=_requirements(),
            signature=_signature(),
            input_example=_example(card),
            metadata={"classes": list(card.classes), "colours": [list(colour) for colour in card.colours]},
            model_config={"files": digests_of(folder)},
        )
    return Packed(digests_of(destination), no_program, drift)


def _write_program(folder: Path, card: ModelCard) -> str | None:
    """Write the program, or return why there is none."""
    key = (card.network, len(card.classes))
    if key not in _failed:
        reason = write_program(folder)
        if reason is None:
            return None
        _failed[key] = reason
    return _failed[key]


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below the folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def model_card_of(packed: Path) -> str:
    return (packed / "artifacts" / PACKED_FOLDER / CARD_NAME).read_text()


def _signature() -> Any:
    """Without a schema of the input: with one, MLflow's server casts whatever it gets to uint8, and floats in [0,1] become
    black images. The packed model checks what it is given."""
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    class_ids = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1))])
    params = ParamSchema([ParamSpec("confidence", "boolean", False)])
    return ModelSignature(outputs=class_ids, params=params)


def _example(card: ModelCard) -> np.ndarray:
    """One image of two slopes: nobody's photograph travels with a model. Of other bands than RGB they rise from low to high."""
    height, width = EXAMPLE_SIZE
    down, across = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    image = np.stack(np.broadcast_arrays(down, across, (down + across) / 2), axis=-1)
    if card.bands is None:
        return image.astype(np.uint8)[None]
    low, high = np.array(card.bands.low), np.array(card.bands.high)
    return (low + (high - low) * image[..., :1] / MOST).astype(np.float32)[None]


def _requirements() -> list[str]:
    """What packed_model.py imports, at this environment's versions; given, MLflow need not run it to find out."""
    return [
        f"{name}=={importlib.metadata.version(name).partition('+')[0]}"
        for name in ("mlflow", "torch", "numpy", "pillow")
    ]


# ---- The model card


def write_card(
    name: str, card: ModelCard, record: StageRecord, least_side: int | None = None, no_program: str | None = None
) -> str:
    """The model card: what a person must know who finds a model in the registry and nobody to ask. Every value is one line
    of text, in which nothing is markup.

    `least_side`: the shortest side that the exported program takes; `no_program`: why there is none.
    """
    environment = jinja2.Environment(trim_blocks=True, undefined=jinja2.StrictUndefined, finalize=_as_text)
    environment.filters |= {"short": short_digest, "code": _Code, "quoted": _quoted}
    template = environment.from_string(Path(__file__).with_name("model_card.md.j2").read_text())
    lineage = Lineage.model_validate(record.lineage)
    text = template.render(
        name=name,
        card=card,
        record=record,
        lineage=lineage,
        config=record.config,
        stage=record.config[lineage.stage],
        summary=record.summary,
        champion=one_line(f"models:/{name}@{CHAMPION}"),
        mean_iou_rule=MEAN_IOU_RULE,
        least_side=least_side,
        no_program=no_program,
        nan=math.nan,
    )
    return redact(text)


class _Code(str):
    """Text of an indented block, in which Markdown has no markup."""


def _quoted(text: str) -> _Code:
    return _Code(json.dumps(text, ensure_ascii=False))


def _as_text(value: object) -> str:
    return value if isinstance(value, _Code) else markdown(value)
