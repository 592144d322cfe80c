"""A network in memory that predicts images in memory, as `threestage predict` predicts files."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from threestage.data import storage
from threestage.data.band_images import decode_pixels
from threestage.data.classes import Colour
from threestage.data.headers import BadImage
from threestage.data.palette import palette_png
from threestage.data.records import MAX_IMAGE_PIXELS, downscale_image
from threestage.models.export import ModelCard
from threestage.models.network import Network, size_multiple
from threestage.prediction.memory import most_pixels
from threestage.prediction.predict import enlarged
from threestage.prediction.tta import (
    VIEW_PIXELS,
    TTASettings,
    predict_in_windows,
    predict_with_tta,
    protocol_for,
)
from threestage.report.mask_images import overlay


@dataclass(frozen=True)
class Prediction:
    """Of one image: `pixels` (H,W,C) and `class_ids` (H,W), uint8; `confidence` (H,W) float32 in [0,1]."""

    pixels: np.ndarray
    class_ids: np.ndarray
    confidence: np.ndarray
    classes: tuple[str, ...]
    colours: tuple[Colour, ...]

    def overlay(self) -> Image.Image:
        """The image under the colours of its classes."""
        return Image.fromarray(overlay(self.pixels, self.class_ids, self.colours))

    def shares(self) -> dict[str, float]:
        """Class → share of the pixels."""
        counts = np.bincount(self.class_ids.reshape(-1), minlength=len(self.classes))
        return dict(zip(self.classes, (counts / self.class_ids.size).tolist(), strict=False))

    def save(self, path: str | Path) -> None:
        """The class ids as a PNG with a palette."""
        storage.write_bytes(str(path), palette_png(self.class_ids, self.colours))


@dataclass(frozen=True)
class Model:
    """A trained network, on the GPU where there is one."""

    network: Network
    card: ModelCard

    def predict(self, image: str | Path | np.ndarray) -> Prediction:
        """Of a file, an S3 URI, or pixels (H,W,3) uint8 RGB; at the image's own size. A model of other bands
        takes (H,W,B), the numbers that its files hold."""
        bands = self.card.bands
        if isinstance(image, str | Path):
            pixels = decode_pixels(storage.read_bytes(str(image)), MAX_IMAGE_PIXELS, bands)
        else:
            pixels = np.array(image) if bands is None else bands.levels(np.atleast_3d(image))
        return self.predict_batch([pixels])[0]

    def predict_batch(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Of images (H,W,C) uint8, as `decode_pixels` gives them, of one size, in one forward pass: whole, or in the windows that
        the model was trained with; a large image that does not fit into the free memory in smaller ones. Raises BadImage for
        one below `downscale`.
        """
        size, factor = images[0].shape, self.card.downscale
        if min(size[:2]) < factor:
            raise BadImage(
                f"has {size[1]}x{size[0]} pixels, fewer than the model's downscale={factor}", "image/too-small"
            )
        small = np.stack([downscale_image(image, factor) for image in images])
        device = next(self.network.parameters()).device
        found = self._classes(torch.from_numpy(small).to(device).permute(0, 3, 1, 2))
        class_ids, confidence = (part.cpu().numpy() for part in found[:2])
        return [
            Prediction(
                image, enlarged(ids, factor, size), enlarged(sure, factor, size), self.card.classes, self.card.colours
            )
            for image, ids, sure in zip(images, class_ids, confidence, strict=True)
        ]

    def _classes(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class, confidence and entropy of images (N,3,H,W). What memory a pixel takes is measured for large ones only."""
        protocol, multiple = protocol_for(TTASettings(), self.card.inference), size_multiple(self.network.settings)
        whole = partial(predict_with_tta, self.network, protocol=protocol, multiple=multiple)
        if pixels.shape[-2] * pixels.shape[-1] > VIEW_PIXELS:
            fitting = most_pixels(self.network, whole, pixels.device, (protocol,))
            if pixels.shape[-2] * pixels.shape[-1] > fitting:
                return predict_in_windows(self.network, pixels, protocol, multiple, fitting)
        return whole(pixels)
