"""A model as MLflow keeps it: packed_model.py as its code, and one folder that needs neither MLflow nor this package.

model/artifacts/model/
    model.safetensors, model.json    the weights, and how to build the network (threestage.models.export)
    program.pt2                      the network as a torch.export program: RGB in [0,1] (N,3,H,W) → logits (N,C,H,W)
    lineage.json                     where it comes from (threestage.lineage)
    README.md                        the model card
"""

import importlib.metadata
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from threestage.models.export import PROGRAM, ModelCard, export_program
from threestage.registry.card import write_card
from threestage.registry.models import CARD, PACKED_FOLDER
from threestage.registry.records import StageRecord
from threestage.tracking import redact_tree

LINEAGE_NAME, CARD_NAME = "lineage.json", "README.md"
EXAMPLE_SIZE = (64, 96)


def pack_model(files: Mapping[str, bytes], destination: Path, record: StageRecord, name: str) -> None:
    """Write an MLflow model at `destination` from the files of a model's folder. `name`: that it is registered under."""
    import mlflow.pyfunc

    lineage = redact_tree(record.lineage)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, PACKED_FOLDER)
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        (folder / PROGRAM).write_bytes(export_program(str(folder)))
        (folder / LINEAGE_NAME).write_text(json.dumps(lineage, indent=1))
        card = ModelCard.model_validate_json(files[CARD])
        (folder / CARD_NAME).write_text(write_card(name, card, record))
        mlflow.pyfunc.save_model(
            path=str(destination),
            python_model=str(Path(__file__).with_name("packed_model.py")),
            artifacts={"model": str(folder)},
            pip_requirements=_requirements(),
            signature=_signature(),
            input_example=_example(),
            metadata={"classes": list(card.classes), "colours": [list(colour) for colour in card.colours]},
        )


def model_card_of(packed: Path) -> str:
    return (packed / "artifacts" / PACKED_FOLDER / CARD_NAME).read_text()


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, 3))])
    class_ids = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1))])
    params = ParamSchema([ParamSpec("confidence", "boolean", False)])
    return ModelSignature(inputs=images, outputs=class_ids, params=params)


def _example() -> np.ndarray:
    """One image of two slopes: nobody's photograph travels with a model."""
    height, width = EXAMPLE_SIZE
    down, across = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    image = np.stack(np.broadcast_arrays(down, across, (down + across) / 2), axis=-1)
    return image.astype(np.uint8)[None]


def _requirements() -> list[str]:
    """What packed_model.py imports, at this environment's versions; given, MLflow need not run it to find out."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in ("mlflow", "torch", "numpy")]
