"""Pixels that are void in most labelled masks: a camera's own vehicle and frame, where a pseudo-mask is void too."""

import base64

import numpy as np

from threestage import IGNORE_INDEX
from threestage.data.batches import SampleSet
from threestage.data.records import Bytes, decode_mask, encode_mask
from threestage.errors import InputError


def fixed_void(samples: SampleSet, share: float) -> str:
    """Base64 of a PNG (H,W) at the size of training: 1 where at least `share` of the samples' masks is void, else 0.

    Raises InputError, naming an image, when the masks are not all of one size.
    """
    first = samples.decoded(0).maps["mask"]
    votes = np.zeros(first.shape, np.int64)
    for index, sample in enumerate(samples.samples):
        mask = samples.decoded(index).maps["mask"]
        if mask.shape != first.shape:
            raise InputError(
                f"data.fixed_void={share} takes masks of one size, but {samples.samples[0].image_id} has {first.shape} and "
                f"{sample.image_id} {mask.shape} pixels; set it to null",
                "data/mask-sizes",
            )
        votes += mask == IGNORE_INDEX
    region = votes >= share * len(samples)
    return base64.b64encode(encode_mask(region.astype(np.uint8))).decode()


def unpacked(region: str) -> Bytes:
    """uint8 (H,W) of what `fixed_void` gave."""
    return decode_mask(base64.b64decode(region))
