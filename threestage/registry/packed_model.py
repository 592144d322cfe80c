"""The script that MLflow packs into a registered model ("models from code"): images in, class ids out.

It runs wherever the model is loaded, without threestage and without pickle; torch is imported once weights are needed.
"""

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

PIXELS_AT_ONCE = 2**22
IMAGES_AT_ONCE, LEAST_SIDE, MOST_SIDE = 1024, 33, 16384  # of the images that the program was exported for


class PackedModel(PythonModel):  # type: ignore[misc,unused-ignore]
    """Predicts class ids with the exported program in the artifact folder "model"."""

    def load_context(self, context: Any) -> None:
        import torch

        folder = Path(context.artifacts["model"])
        card = json.loads((folder / "model.json").read_text())
        self.downscale = card["downscale"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mean = torch.tensor(card["network"]["mean"], device=self.device).view(3, 1, 1)
        self.network = _load_program(folder / "program.pt2", self.device)

    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:
        """uint8 RGB images (N,H,W,3) → uint8 class ids (N,H,W); with params {"confidence": True} a dict of "class_ids" and
        "confidence", float32 (N,H,W) in [0,1]. Images are looked at whole, at a single scale."""
        wanted, shape = bool((params or {}).get("confidence")), model_input.shape[:3]
        if max(shape[1:]) > MOST_SIDE * self.downscale:
            raise ValueError(
                f"images of {shape[1]}x{shape[2]}: the program takes sides up to {MOST_SIDE * self.downscale}"
            )
        class_ids = np.zeros(shape, np.uint8)
        confidence = np.zeros(shape if wanted else 0, np.float32)
        for rows in _pieces(shape):
            ids, sure = self._ask(np.ascontiguousarray(model_input[rows]))
            class_ids[rows] = _enlarged(ids, self.downscale, shape[1:])
            if wanted:
                confidence[rows] = _enlarged(sure, self.downscale, shape[1:])
        return {"class_ids": class_ids, "confidence": confidence} if wanted else class_ids

    def _ask(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Class ids and confidences, at the size that the network looks at."""
        import torch
        from torch.nn import functional

        pixels = torch.from_numpy(_reduced(images, self.downscale)).to(self.device).permute(0, 3, 1, 2).float() / 255
        height, width = pixels.shape[-2:]
        missing = (0, max(0, LEAST_SIDE - width), 0, max(0, LEAST_SIDE - height))
        with torch.inference_mode():
            if any(missing):
                pixels = functional.pad(pixels - self.mean, missing) + self.mean
            logits = self.network(pixels)[..., :height, :width]
            confidence, class_ids = logits.float().log_softmax(dim=1).max(dim=1)
        return class_ids.to(torch.uint8).cpu().numpy(), confidence.exp().cpu().numpy()


def _load_program(path: Path, device: Any) -> Any:
    """The program as a module on the device. A file that holds pickled objects is refused."""
    import torch
    from torch.export.passes import move_to_device_pass

    with zipfile.ZipFile(path) as archive:
        constants = [name.split("/constants/")[1] for name in archive.namelist() if "/constants/" in name]
    strange = [name for name in constants if not (name.startswith("tensor_") or name.endswith(".json"))]
    if strange:
        raise ValueError(f"{path} holds pickled objects ({', '.join(strange)}) and is not loaded")
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        program = torch.export.load(path)
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
    return move_to_device_pass(program, device).module()


def _pieces(shape: tuple[int, ...]) -> Iterator[slice]:
    """Of (N,H,W): as many images at a time as the memory of a small device holds."""
    number, height, width = shape
    at_once = min(IMAGES_AT_ONCE, max(1, PIXELS_AT_ONCE // max(1, height * width)))
    for start in range(0, number if height and width else 0, at_once):
        yield slice(start, start + at_once)


def _reduced(images: np.ndarray, factor: int) -> np.ndarray:
    """(N,H,W,3) → (N,H//f,W//f,3): the mean of each block, rounded half up, as in training; a side below f stays."""
    if factor == 1 or min(images.shape[1:3]) < factor:
        return images
    number, height, width = len(images), images.shape[1] // factor, images.shape[2] // factor
    blocks = images[:, : height * factor, : width * factor].reshape(number, height, factor, width, factor, 3)
    total = blocks.sum(axis=(2, 4), dtype=np.uint32)
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def _enlarged(values: np.ndarray, factor: int, size: tuple[int, ...]) -> np.ndarray:
    """(N,h,w) at the size (H,W): each value is its block's, the last ones also the ragged rest's."""
    if values.shape[1:] == size:
        return values
    rows, columns = (
        np.minimum(np.arange(wanted) // factor, there - 1) for wanted, there in zip(size, values.shape[1:], strict=True)
    )
    return values[:, rows][:, :, columns]


set_model(PackedModel())
