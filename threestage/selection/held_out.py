"""What a model says of labelled images that it has not learnt: its own mask, and how much each label surprises it."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from threestage import IGNORE_INDEX
from threestage.data import storage
from threestage.data.batches import SampleSet
from threestage.data.records import SplitName, decode_mask, encode_mask, labelled_rows, load_manifest
from threestage.data.samples import TableSamples
from threestage.models.export import load_model
from threestage.prediction.pseudo_masks import quantise
from threestage.prediction.tta import window_logits
from threestage.settings import Settings
from threestage.training.worker import default_device

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
HELD_OUT_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("mask", pa.binary()),
        ("class_ids", pa.binary()),
        ("surprise", pa.binary()),
    ]
)
"""`height`, `width`: of the image; the three PNGs (H,W) uint8 have the size of training. `surprise`: in 255ths of −log LEAST."""
LABELLED_SPLITS: Sequence[SplitName] = ("train", "val")
LEAST = 1e-3
"""Labels that are less likely surprise no more."""
SURPRISES = (np.arange(256) * (-math.log(LEAST) / 255)).astype(np.float32)
DIGEST_KEY = b"threestage.held_out"


class HeldOutTask(Settings):
    """One file of predictions. `model`: its folder; `root`, `version`: of the data set; `ids`: labelled
    images of its train or val split; `uri`: what is written."""

    model: str
    model_digest: str
    root: str
    version: int
    ids: tuple[str, ...]
    uri: str

    def digest(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"model", "uri"}).encode()).hexdigest()


@dataclass(frozen=True)
class HeldOut:
    """An image at the size of training: its mask and the model's (H,W), and the surprise (H,W): −log of the label's probability,
    at most −log LEAST."""

    image_id: str
    source: str
    size: tuple[int, int]
    mask: Bytes
    class_ids: Bytes
    surprise: Floats


@torch.inference_mode()
def predict_held_out(task: HeldOutTask) -> None:
    """Write the file of a task, unless it is there, in this process: labelled images are few."""
    digest = task.digest().encode()
    if (storage.read_metadata(task.uri) or {}).get(DIGEST_KEY) == digest:
        return
    device, manifest = default_device(), load_manifest(task.root, task.version)
    network, card = load_model(task.model)
    network.to(device).eval()
    found = list[dict[str, Any]]()
    for split in LABELLED_SPLITS:
        rows = labelled_rows(task.root, manifest, split, task.ids)
        samples = SampleSet(TableSamples(rows), card.downscale, bands=card.bands)
        places = rows.select(["image_id", "source", "height", "width"]).to_pylist()
        for number, row in enumerate(places):
            decoded = samples.decoded(number)
            pixels = torch.from_numpy(decoded.image).to(device).permute(2, 0, 1)[None].float() / 255
            probabilities = window_logits(network, pixels, card.inference).float().softmax(1)[0]
            mask = decoded.maps["mask"]
            found.append(row | {"mask": encode_mask(mask)} | _against(probabilities, mask))
    schema = HELD_OUT_SCHEMA.with_metadata({DIGEST_KEY: digest})
    storage.write_table(task.uri, pa.Table.from_pylist(found, schema))


def _against(probabilities: torch.Tensor, mask: Bytes) -> dict[str, bytes]:
    """Probabilities (C,H,W) beside a mask (H,W)."""
    labels = torch.from_numpy(mask).to(probabilities.device).long()
    known = labels != IGNORE_INDEX
    of_label = probabilities.gather(0, labels.where(known, labels.new_zeros(()))[None])[0]
    surprise = of_label.clamp(min=LEAST).log() / math.log(LEAST)
    class_ids = probabilities.argmax(0).to(torch.uint8)
    return {
        "class_ids": encode_mask(class_ids.cpu().numpy(), fast=True),
        "surprise": encode_mask(quantise(surprise).cpu().numpy(), fast=True),
    }


def read_held_out(uris: Sequence[str], wanted: frozenset[str] | None = None) -> Iterator[HeldOut]:
    """The images of files that `predict_held_out` wrote, or those of them that are wanted, one row group in memory at a time."""
    for uri in uris:
        for group in storage.read_groups(uri):
            for row in group.to_pylist():
                if wanted is None or row["image_id"] in wanted:
                    mask, class_ids, steps = (decode_mask(row[name]) for name in ("mask", "class_ids", "surprise"))
                    surprise = SURPRISES[steps]
                    size = (row["height"], row["width"])
                    yield HeldOut(row["image_id"], row["source"], size, mask, class_ids, surprise)
