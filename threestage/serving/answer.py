"""The bytes of an image → a status and the bytes of an answer: a mask, figures, an overlay, or why there is none."""

import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from threestage.data.band_images import count_pixels, decode_pixels
from threestage.data.bands import Bands
from threestage.data.headers import BadImage
from threestage.data.palette import palette_png
from threestage.data.parallel import MAX_IMAGE_PIXELS, PixelBudget
from threestage.data.records import DECODER_ERRORS, decoder_complaint, open_image
from threestage.errors import CodedError
from threestage.prediction.image_model import Prediction
from threestage.prediction.predict import overlay_jpeg
from threestage.serving.followed_model import Answered

Form = Literal["mask", "json", "overlay"]
MEDIA_TYPES: dict[Form, str] = {"mask": "image/png", "json": "application/json", "overlay": "image/jpeg"}
DECODED = PixelBudget(MAX_IMAGE_PIXELS)
"""Of all images between their decoding and their answer."""


class Answer(NamedTuple):
    """`version`: of the model that answered; None where none did. `mean_iou`, `drift`: its estimates, where it has them."""

    status: int
    media_type: str
    content: bytes
    version: str | None = None
    mean_iou: float | None = None
    drift: float | None = None


def refusal(status: int, error: CodedError) -> Answer:
    """An error as `--json` of the commands prints it."""
    return Answer(status, MEDIA_TYPES["json"], json.dumps({"error": error.as_json()}).encode())


class _NoImage(BadImage):
    """Of no format that is read."""


def answer_image(
    data: bytes, form: Form, predict: Callable[[np.ndarray], Answered], bands: Bands | None = None
) -> Answer:
    """Decode an image (as `threestage predict` does, with its limits), predict it, and encode the answer.
    `bands`: of the model."""
    try:
        with DECODED.hold(_pixels_of(data, bands)):
            version, prediction = predict(decode_pixels(data, MAX_IMAGE_PIXELS, bands))
            content, estimate = _encoded(prediction, form, version), prediction.estimate
            estimates = (None, None) if estimate is None else (estimate.mean_iou, estimate.drift)
            return Answer(200, MEDIA_TYPES[form], content, version, *estimates)
    except BadImage as error:
        status = 413 if error.code == "image/too-many-pixels" else 415 if isinstance(error, _NoImage) else 422
        return refusal(status, CodedError(f"image: {error.message}", error.code))


def _pixels_of(data: bytes, bands: Bands | None) -> int:
    """By the header. Raises BadImage as `decode_pixels` does."""
    try:
        if bands is not None:
            return count_pixels(data)
        with open_image(data) as image:
            return image.width * image.height
    except BadImage:
        raise
    except DECODER_ERRORS as error:
        kind = _NoImage if isinstance(error, UnidentifiedImageError) else BadImage
        raise kind(decoder_complaint(error), "image/undecodable") from None


def _encoded(prediction: Prediction, form: Form, version: str) -> bytes:
    if form == "mask":
        return palette_png(prediction.class_ids, prediction.colours)
    if form == "overlay":
        return overlay_jpeg(prediction.pixels, prediction.class_ids, prediction.colours)
    return json.dumps(figures(prediction, version)).encode()


def figures(prediction: Prediction, version: str) -> dict[str, Any]:
    """Size, mean confidence, and of every class its share of the pixels; shares and confidences in [0,1]. Estimated mean IoU and
    drift: null of a model without calibration."""
    height, width = prediction.class_ids.shape
    shares = prediction.shares()
    classes = [
        {"id": number, "name": name, "colour": list(colour), "share": shares[name]}
        for number, (name, colour) in enumerate(zip(prediction.classes, prediction.colours, strict=True))
    ]
    confidence = float(prediction.confidence.mean(dtype=np.float64))
    estimate = prediction.estimate
    return {
        "model": version,
        "width": width,
        "height": height,
        "mean_confidence": confidence,
        "estimated_mean_iou": None if estimate is None else estimate.mean_iou,
        "drift": None if estimate is None else estimate.drift,
        "classes": classes,
    }
