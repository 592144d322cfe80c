"""The pictures of method.md, drawn by the code that trains, and that of README.md, of two runs (report.md names them).

threestage demo --local --set stages=1 --out runs/pictures      # stage 1 alone: a minute and a half on a CPU
python docs/make_pictures.py runs/pictures                      # docs/pictures/views.png and pseudo-masks.png
python docs/make_pictures.py --compare runs/control runs/mine   # docs/pictures/comparison.png
"""

import sys
from pathlib import Path

import numpy as np
import torch

from threestage.augment.draws import Draws, generator
from threestage.augment.mixing import draw_mixing
from threestage.augment.plans import StrongSettings
from threestage.augment.views import AugmentSettings, strong_view, weak_view
from threestage.data import storage
from threestage.data.pool import load_pool, read_pool_rows
from threestage.data.records import decode_mask
from threestage.data.samples import Decoded, decode_sample, pool_samples
from threestage.data.split import saved_split
from threestage.data.synthetic import CLASSES, COLOURS, scene
from threestage.report.mask_images import Bytes, colourise, panel
from threestage.report.validation_images import Shown, comparison_picture
from threestage.training.losses import keep_confident

FOLDER = Path(__file__).parent / "pictures"
AUGMENT = AugmentSettings(crop_size=(64, 64), scale=(0.8, 1.3), strong=StrongSettings(cutout_size=12))
THRESHOLD = 0.7
SCENES = (3, 8)
ROWS = (0, 1, 2, 3)
"""Of the pool's first file."""


def views(uri: str) -> None:
    """What a network is shown of an unlabelled image: A x_u, and W of its label map. One row each."""
    images, masks = map(np.stack, zip(*(scene(0, index) for index in SCENES), strict=True))
    canvas, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks)
    draws = Draws(generator("documentation"))
    weak = weak_view(canvas, torch.tensor([images.shape[1:3]] * len(images)), AUGMENT, draws)
    strong = strong_view(weak, AUGMENT.strong, draws)
    mixed = draw_mixing(len(images), AUGMENT.crop_size, 1.0, draws, torch.device("cpu"))
    on_weak = weak.warp(labels)
    on_strong = strong.warp(on_weak)
    columns = [
        ("image", images, masks),
        ("weak view", pixels(weak.image), on_weak.numpy()),
        ("strong view", pixels(strong.image), on_strong.numpy()),
        ("with CutMix", pixels(mixed(strong.image)), mixed(on_strong).numpy()),
    ]
    save(uri, [(title, alternating(shown, below)) for title, shown, below in columns])


def pseudo_masks(uri: str, run: str) -> None:
    """What stage 1 says of images whose masks no stage has seen, and what of it L_pm keeps from THRESHOLD on."""
    file = load_pool(storage.join(run, "pool.parquet"))[0]
    truth = next(read_pool_rows(file))
    samples = next(pool_samples(file, storage.join(run, "pseudo_masks1"), lambda reject: None))
    found = [decode_sample(samples[row], 1) for row in ROWS]
    columns = [
        ("image", [decoded.image for decoded in found]),
        ("pseudo-mask", [coloured(decoded.maps["pseudo_mask"]) for decoded in found]),
        ("confidence", [np.repeat(decoded.maps["confidence"][..., None], 3, axis=2) for decoded in found]),
        (f"kept from {THRESHOLD}", [coloured(kept(decoded)) for decoded in found]),
        ("truth", [coloured(decode_mask(truth[row].mask or b"")) for row in ROWS]),
    ]
    save(uri, columns)


def comparison(uri: str, control: str, run: str) -> None:
    """What training on the labels alone and a run of as many steps see of four validation images."""
    results = {folder: storage.read_json(storage.join(folder, "results.json")) for folder in (control, run)}
    columns = []
    for title, folder in (("labels only", control), ("threestage", run)):
        stages = results[folder]["stages"]
        steps = sum(figures["steps"] for figures in stages.values())
        part = storage.join(folder, list(stages)[-1])
        columns.append(Shown(f"{title}\n{steps:,} steps", part, list(stages.values())[-1]["mean_iou"]))
    split = saved_split(storage.join(run, "split.json"))[0]
    comparison_picture(results[run]["data"]["root"], split, columns).quantize(64).save(uri, optimize=True)


def kept(decoded: Decoded) -> Bytes:
    """The pseudo-mask with 255 where it is not confident, (H,W)."""
    class_ids, confidence = (torch.from_numpy(decoded.maps[name].copy()) for name in ("pseudo_mask", "confidence"))
    return keep_confident(class_ids, confidence, THRESHOLD).numpy()


def pixels(image: torch.Tensor) -> Bytes:
    """(N,3,H,W) → (N,H,W,3) uint8."""
    return image.permute(0, 2, 3, 1).numpy()


def coloured(mask: Bytes) -> Bytes:
    return colourise(mask, COLOURS)


def alternating(images: Bytes, masks: Bytes) -> list[Bytes]:
    return [picture for image, mask in zip(images, masks, strict=True) for picture in (image, coloured(mask))]


def save(uri: str, columns: list[tuple[str, list[Bytes]]]) -> None:
    panel(columns, CLASSES, COLOURS).quantize(256).save(uri, optimize=True)


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        comparison(str(FOLDER / "comparison.png"), *sys.argv[2:])
    else:
        views(str(FOLDER / "views.png"))
        pseudo_masks(str(FOLDER / "pseudo-masks.png"), sys.argv[1])
