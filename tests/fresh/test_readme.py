"""README.md, done as it says: its blocks of commands in their order, in a fresh clone, with real photos.

What differs from the page: `git clone` takes this checkout, the S3 endpoint's address is another, and all runs but the
demo's have fewer steps and smaller crops (SHORT), and weights from a file. It takes half an hour.
"""

import os
import re
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.fresh.processes import environment
from tests.s3 import variables
from tests.unit.test_cluster_files import ROOT
from threestage.data import storage

SHARED = ROOT.parent / "shared/data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not SHARED.exists(), reason="needs CamVid and MobileNetV2's weights in ../shared/data"),
]
README = (ROOT / "README.md").read_text()

# Stages have 6 steps; stage 2 of a sweep, whose scheduler compares trials at step 200, has 300 small ones.
SHORT = """
threestage() {
  short="--set stage1.steps=6 --set augment.crop_size=[64,64] --set data.downscale=4 --set pseudo_mask.on_collapse=ignore"
  short="$short --set network.pretrained=false --set network.weights=$PWD/mobilenetv2.pth"
  six="--set stage2.steps=6"
  many="--trials 2 --repeat 1 --set stage2.steps=300 --set training.evaluate_every=100"
  small="--set stage2.labelled_batch=2 --set stage2.unlabelled_batch=2"
  case $1 in
    train|run|check|submit) command threestage "$@" $short $six ;;
    sweep) command threestage "$@" $short $many $small ;;
    *) command threestage "$@" ;;
  esac
}
"""
ACTIVATE = "source .venv/bin/activate"


class Files(NamedTuple):
    """The clone, and what its shells have beside the machine's environment."""

    clone: Path
    environment: dict[str, str]

    def bash(self, script: str, **environment: str) -> str:
        """What a shell in the clone printed. Fails at the first command that does."""
        ended = subprocess.run(
            ["bash", "-e", "-c", SHORT + script],
            cwd=self.clone,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(ended.stdout)
        assert ended.returncode == 0, f"{script}\n{ended.stdout[-4000:]}"
        return ended.stdout


def blocks(heading: str, language: str = "") -> list[str]:
    """The code blocks of a section of the page."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The page's first block, done; then photos, masks and files as the page names them."""
    home = tmp_path_factory.mktemp("readme")
    (first,) = (block for block in blocks("Install and demo") if "git clone" in block)
    files = Files(home, environment())
    files.bash(first.replace("git clone …", f"git clone --quiet {ROOT}"))
    files = Files(home / "threestage", environment())
    _put_photos(files.clone)
    return files


def _put_photos(folder: Path) -> None:
    """30 photos with masks of the class map's ids, 25 more without, 3 new ones; the page's files; the weights."""
    sources = sorted((SHARED / "camvid/train/images").iterdir())
    for name, some in (("photos", sources[:30]), ("more_photos", sources[60:85]), ("new_photos", sources[100:103])):
        (folder / name).mkdir()
        for source in some:
            shutil.copy(source, folder / name)
    (folder / "masks").mkdir()
    for source in sources[:30]:
        (mask,) = (SHARED / "camvid/train/masks").glob(f"{source.stem}.*")
        with Image.open(mask) as picture:
            ids = np.asarray(picture)
        own = np.select([ids == 3, ids == 4, ids == 8], [0, 7, 3], 255).astype(np.uint8)
        Image.fromarray(own).save(folder / f"masks/{source.stem}.png")
    for text in blocks("On a cluster", "yaml"):
        (folder / text.split()[1]).write_text(text)
    shutil.copy(SHARED / "weights/mobilenetv2_100.imagenet.pth", folder / "mobilenetv2.pth")


def test_the_demo(files: Files) -> None:
    stages = storage.read_json(str(files.clone / "runs/demo-0/results.json"))["stages"]
    assert stages["stage3"]["mean_iou"] > stages["stage1"]["mean_iou"]
    with Image.open(files.clone / "runs/demo-0/pictures.png") as pictures:
        assert pictures.width > 400


def test_own_images(files: Files) -> None:
    files.bash(blocks("Your own images")[0])
    assert len(list((files.clone / "predicted/masks").iterdir())) == 3


@pytest.fixture
def endpoint(files: Files, bucket: str) -> str:
    """An S3 endpoint with what the page's commands expect in its bucket."""
    for name in ("photos", "masks", "more_photos", "new_photos"):
        for file in (files.clone / name).iterdir():
            storage.write_bytes(f"s3://bucket/{name}/{file.name}", file.read_bytes())
    return os.environ["AWS_ENDPOINT_URL"]


def test_on_s3(files: Files, endpoint: str) -> None:
    (script,) = blocks("On S3")
    said = files.bash(f"{ACTIVATE}\n{script}".replace("http://minio.internal:9000", endpoint), **variables(endpoint))
    assert "3 images predicted" in said


def test_on_a_cluster(files: Files) -> None:
    start, submit = blocks("On a cluster")
    first, _, script = start.partition("\n")
    assert first.split()[:2] == ["make", "cluster"]
    with subprocess.Popen(
        ["make", "cluster"],
        cwd=files.clone,
        env=files.environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as cluster:
        try:
            assert cluster.stdout and any(line.startswith("Ready") for line in cluster.stdout), "it did not start"
            said = files.bash(f"{ACTIVATE}\n{script}\n{submit}")
        finally:
            os.killpg(cluster.pid, signal.SIGINT)  # as Ctrl-C in a terminal
    assert said.count("stage2") > 1


def test_a_sweep(files: Files) -> None:
    (script,) = blocks("A sweep")
    files.bash(f"{ACTIVATE}\n{script}")
    assert storage.read_json(str(files.clone / "runs/best/results.json"))["stages"]


def test_pulling_a_model(files: Files) -> None:
    (script,) = blocks("Pull a model")
    files.bash(f"{ACTIVATE}\n{script}")
    assert (files.clone / "model/model.safetensors").exists()
    images = textwrap.dedent("""
        import mlflow, numpy as np
        images = np.zeros((2, 90, 120, 3), np.uint8)
        found = mlflow.pyfunc.load_model("models:/mine@champion").predict(images)
        assert found.shape == (2, 90, 120), found.shape
    """)
    (files.clone / "use.py").write_text(images)
    files.bash(f"{ACTIVATE}\npython use.py", MLFLOW_TRACKING_URI="sqlite:///mlflow.db")
