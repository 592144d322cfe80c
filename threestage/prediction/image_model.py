"""A network in memory that predicts images in memory, as `threestage predict` predicts files."""

from collections.abc import Callable, Sequence
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
from threestage.prediction.estimates import Estimate, Estimator
from threestage.prediction.memory import most_pixels
from threestage.prediction.predict import ModelFiles, enlarged, estimator_of, network_of
from threestage.prediction.tta import (
    VIEW_PIXELS,
    TTASettings,
    predict_in_windows,
    predict_with_tta,
    protocol_for,
)
from threestage.report.mask_images import overlay
from threestage.training.worker import default_device


@dataclass(frozen=True)
class Prediction:
    """Of one image: `pixels` (H,W,C) and `class_ids` (H,W), uint8; `confidence` (H,W) float32 in [0,1]. `estimate`: of its mean
    IoU and its drift, where the model is calibrated."""

    pixels: np.ndarray
    class_ids: np.ndarray
    confidence: np.ndarray
    classes: tuple[str, ...]
    colours: tuple[Colour, ...]
    estimate: Estimate | None = None

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
    """A trained network, on the GPU where there is one. `estimator`: None where it is not calibrated."""

    network: Network
    card: ModelCard
    estimator: Estimator | None = None

    @classmethod
    def of(cls, files: ModelFiles, where: str) -> "Model":
        """From the files of a model's folder. Raises InputError, which begins with `where`, where they are damaged."""
        network, card = network_of(files, where)
        return cls(network.to(default_device()), card, estimator_of(files, where))

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
        found, estimates = self._asked(torch.from_numpy(small).to(device).permute(0, 3, 1, 2))
        class_ids, confidence = ([enlarged(one, factor, size) for one in part.cpu().numpy()] for part in found[:2])
        about = self.card.classes, self.card.colours
        return [
            Prediction(image, ids, sure, *about, estimate)
            for image, ids, sure, estimate in zip(images, class_ids, confidence, estimates, strict=True)
        ]

    @torch.inference_mode()
    def _asked(self, pixels: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], Sequence[Estimate | None]]:
        """Class, confidence and entropy of images (N,3,H,W), and the estimate of each."""
        ask = self._way(pixels)  # measures the memory by forward passes of its own
        if self.estimator is None:
            return ask(pixels), [None] * len(pixels)
        with self.estimator.measure(self.network) as measure:
            found = ask(pixels)
        return found, [self.estimator.of(one) for one in measure(len(pixels), found[0][0].numel()).cpu().numpy()]

    def _way(self, pixels: torch.Tensor) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Whole or in windows. What memory a pixel takes is measured for large images only."""
        protocol, multiple = protocol_for(TTASettings(), self.card.inference), size_multiple(self.network.settings)
        whole = partial(predict_with_tta, self.network, protocol=protocol, multiple=multiple)
        if pixels.shape[-2] * pixels.shape[-1] > VIEW_PIXELS:
            fitting = most_pixels(self.network, whole, pixels.device, (protocol,))
            if pixels.shape[-2] * pixels.shape[-1] > fitting:
                return partial(
                    predict_in_windows, self.network, protocol=protocol, multiple=multiple, most_pixels=fitting
                )
        return whole
