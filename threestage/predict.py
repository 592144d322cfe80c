"""A model over a folder of images: mask PNGs and overlays."""

import io
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from threestage.data import storage
from threestage.data.palette import palette_png
from threestage.data.records import decode_image, downscale_image
from threestage.errors import InputError
from threestage.evaluation import BATCH
from threestage.models.export import CARD, ModelCard, load_model
from threestage.models.network import Network
from threestage.pseudo_masks import predict_images
from threestage.registry import RegistrySettings, open_registry
from threestage.report import overlay
from threestage.training.worker import default_device

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CHUNK = 16


@dataclass(frozen=True)
class Predicted:
    images: int
    rejected: tuple[tuple[str, str], ...]  # (file, reason)


def open_model(model: str, registry: RegistrySettings) -> tuple[Network, ModelCard]:
    """A model from the registry (models:/NAME@stage3, models:/NAME/2), or from a folder: a model's, a stage's or a run's.

    Raises InputError where there is none.
    """
    if model.startswith("models:/"):
        with tempfile.TemporaryDirectory() as folder:
            return load_model(str(open_registry(registry).pull(model, folder)))
    for inner in ("", "model", "stage3/model", "stage2/model", "stage1/model"):
        if storage.exists(storage.join(model, inner, CARD) if inner else storage.join(model, CARD)):
            return load_model(storage.join(model, inner) if inner else model)
    raise InputError(f"{model}: holds no model; give models:/NAME@stage3, or the folder of a run, a stage or a model")


def predict_folder(
    network: Network,
    card: ModelCard,
    source: str,
    destination: str,
    show: Callable[[int, int], None] = lambda n, of: None,
) -> Predicted:
    """Write `masks/NAME.png` (palette, class ids, the image's size) and `overlays/NAME.jpg` for every image of a folder.

    A file that cannot be decoded is passed over and listed. Raises InputError where there is no image at all.
    """
    files = [uri for uri in storage.list_files(source) if uri.lower().endswith(IMAGE_ENDINGS)]
    if not files:
        raise InputError(f"{source}: no images there ({', '.join(IMAGE_ENDINGS)}); give the folder that holds them")
    names = _output_names(source, files)
    device = default_device()
    network.to(device)
    rejected: list[tuple[str, str]] = []
    for start in range(0, len(files), CHUNK):
        readable, images = _decode(files[start : start + CHUNK], rejected)
        small = [downscale_image(image, card.downscale) for image in images]
        for index, class_ids, _, _ in predict_images(network, small, BATCH, device):
            _write(
                destination, names[readable[index]], images[index], _enlarge(class_ids, images[index].shape[:2]), card
            )
        show(min(start + CHUNK, len(files)), len(files))
    return Predicted(len(files) - len(rejected), tuple(rejected))


def _decode(files: list[str], rejected: list[tuple[str, str]]) -> tuple[list[str], list[np.ndarray]]:
    readable, images = [], []
    for uri in files:
        try:
            images.append(decode_image(storage.read_bytes(uri)))
            readable.append(uri)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            rejected.append((uri, str(error)))
    return readable, images


def _output_names(source: str, files: list[str]) -> dict[str, str]:
    """The path of each file below the source, without its ending unless two files differ in nothing else."""
    relative = {uri: uri.removeprefix(storage.absolute(source) + "/") for uri in files}
    stems = Counter(name.rsplit(".", 1)[0] for name in relative.values())
    return {uri: name if stems[stem := name.rsplit(".", 1)[0]] > 1 else stem for uri, name in relative.items()}


def _enlarge(class_ids: torch.Tensor, size: tuple[int, ...]) -> np.ndarray:
    """A mask (h,w) at the image's size (H,W), by nearest."""
    return np.asarray(Image.fromarray(class_ids.numpy()).resize((size[1], size[0]), Image.Resampling.NEAREST))


def _write(destination: str, name: str, image: np.ndarray, mask: np.ndarray, card: ModelCard) -> None:
    storage.write_bytes(storage.join(destination, "masks", f"{name}.png"), palette_png(mask, card.colours))
    stream = io.BytesIO()
    Image.fromarray(overlay(image, mask, card.colours)).save(stream, format="JPEG", quality=90)
    storage.write_bytes(storage.join(destination, "overlays", f"{name}.jpg"), stream.getvalue())
