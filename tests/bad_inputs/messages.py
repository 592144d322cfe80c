"""Settings and places that a command cannot use: one line says why and what works."""

from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from tests.bad_inputs import BadInput, Ended, refused, threestage
from tests.failing_s3 import ERRORS, failing_s3
from tests.s3 import variables

CLASSES = """
classes:
  - {name: ground, colour: [0, 0, 0], ids: [0]}
  - {name: thing, colour: [255, 0, 0], ids: [1]}
  - {name: sign, colour: [0, 0, 255], ids: [2]}
"""
TINY = [f"--set={key}" for key in ("data.root=data", "data.labelled=all", "stages=1", "stage1.steps=1")]


def data_set(images: int = 4) -> None:
    """`data`: images of two classes of three, with a val split of two."""
    Path("classes.yaml").write_text(CLASSES)
    random = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 2)):
        for kind in ("images", "masks"):
            Path(split, kind).mkdir(parents=True)
        for i in range(count):
            mask = np.kron(random.permutation([0, 1, 1, 0]).reshape(2, 2), np.ones((32, 32))).astype(np.uint8)
            Image.fromarray(mask).save(f"{split}/masks/{split}{i}.png")
            noise = random.integers(0, 50, (64, 64, 3)) + 200 * mask[..., None]
            Image.fromarray(noise.astype(np.uint8)).save(f"{split}/images/{split}{i}.png")
        masks = ("--masks", f"{split}/masks", "--class-map", "classes.yaml", "--split", split)
        assert threestage("ingest", f"{split}/images", "data", *masks, "--local").code == 0


def run(*changes: str) -> Ended:
    settings = [f"--set={change}" for change in ("pseudo_mask.final_stage=false", *changes)]
    return threestage("run", "demo", "--local", "--out", "run", *TINY, *settings)


def one_labelled_image(folder: Path) -> str:
    data_set(images=1)
    ended = run("stage1.labelled_batch=2", "pseudo_mask.on_collapse=ignore")
    fix = "network.head=deeplabv2", "stage1.labelled_batch=1"
    if "set network.head=deeplabv2 and stage1.labelled_batch=1" not in ended.err:
        return f"no way out: {ended.err}"
    return f"{refused(ended)}; with the settings it names: exit code {run(*fix).code}"


def class_without_pixels(folder: Path) -> str:
    data_set()
    ended = run("stage1.labelled_batch=2")
    warned = "no labelled pixel of sign in 4 labelled masks" in ended.text
    return f"exit code {ended.code}, {'a warning names the class' if warned else ended.text[-300:]}"


def unknown_key(folder: Path) -> str:
    ended = threestage("config", "demo", "--set", "steps=30")
    named = "did you mean stage1.steps or stage2.steps or stage3.steps?" in ended.err
    return f"exit code {ended.code}, {'the keys of that name are listed' if named else ended.err}"


def demo_on_other_data(folder: Path) -> str:
    return refused(threestage("demo", "--local", "--out", "out", "--set", "data.root=mine"))


def google_cloud(folder: Path) -> str:
    return refused(threestage("ingest", "gs://bucket/photos", "data", "--format", "images", "--local"))


def missing_bucket(folder: Path) -> str:
    with failing_s3(ERRORS["bucket"]) as (endpoint, _), mock.patch.dict("os.environ", variables(endpoint)):
        ended = threestage("ingest", "s3://nobucket/photos", "data", "--format", "images", "--local")
    return f"{refused(ended)}, {'the bucket is named' if 'nobucket' in ended.err else ended.err}"


BAD_INPUTS = [
    BadInput(
        "one labelled image with a head that needs two",
        "refused [config/batch]; with the settings it names: exit code 0",
        one_labelled_image,
    ),
    BadInput("a class without labelled pixels", "exit code 0, a warning names the class", class_without_pixels),
    BadInput("`--set steps=30`", "exit code 2, the keys of that name are listed", unknown_key),
    BadInput("`demo` with other data than its scenes", "refused [demo/other-data]", demo_on_other_data),
    BadInput("a path of `gs://`", "refused [storage/scheme]", google_cloud),
    BadInput("a bucket that does not exist", "refused [storage/no-bucket], the bucket is named", missing_bucket),
]
