"""`threestage ingest` shows what the masks hold, says what is odd, and ends with the command that comes next."""

import json
from pathlib import Path

from tests.unit.cli.test_app import Run, ingest_arguments, photos, threestage

__all__ = ["photos", "threestage"]


def test_ingest_shows_the_classes_and_the_next_command(threestage: Run, photos: Path) -> None:
    code, out, _ = threestage(*ingest_arguments(photos))
    assert code == 0, out
    shown = [line for line in out.splitlines() if "■" in line]
    assert "of 10 with a mask" in out and all(name in "".join(shown) for name in ("ground", "thing"))
    assert f"look at the labels: {photos}/data/preview.png\n" in out
    assert out.endswith(f"next:  threestage check own_images --set data.root={photos}/data --local\n")
    code, again, _ = threestage(*ingest_arguments(photos, "--json"))
    report = json.loads(again)
    assert report["labelled"] == 10 and report["added_labels"] == 0
    assert [one["name"] for one in report["class_counts"]] == ["ground", "thing"]
    assert sum(one["pixels"] for one in report["class_counts"]) == 10 * 40 * 48


def test_images_without_masks_are_labelled_next(threestage: Run, photos: Path) -> None:
    _, out, _ = threestage("ingest", "images", "pool", "--format", "images", "--local")
    assert out.endswith("next:  threestage ingest IMAGES pool --masks MASKS --class-map classes.yaml\n")
    assert "■" not in out and not (photos / "pool/preview.png").exists()
