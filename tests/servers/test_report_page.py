"""The page in a real browser, and in a real MLflow store."""

import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import Browser
from tests.runs import copy_run
from threestage.data import storage
from threestage.mlflow_sync.client import open_registry
from threestage.mlflow_sync.records import RegistrySettings
from threestage.report import sections
from threestage.report.report import render, write_report
from threestage.report.run_reader import log_page, read_run
from threestage.report.validation_images import Example, ExampleGroup

IMAGES, SIDE, LIMIT_S = 200, 96, 2.0
CLASSES = ("background", "disc", "ring", "square")
COLOURS = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(finished_run, tmp_path_factory.mktemp("report") / "run")


def examples(number: int) -> Iterator[Example]:
    """Noisy images with blobs that differ from stage to stage: nothing in them compresses well."""
    random = np.random.default_rng(0)
    groups: tuple[ExampleGroup, ...] = ("worst", "middle", "best")
    for i in range(number):
        maps = [random.integers(0, 4, (SIDE // 8, SIDE // 8), np.uint8).repeat(8, 0).repeat(8, 1) for _ in range(4)]
        yield Example(
            image_id=f"val/{i:04d}",
            group=groups[3 * i // number],
            image=random.integers(0, 256, (SIDE, SIDE, 3), np.uint8),
            mask=maps[0],
            class_ids=tuple(maps[1:]),
            confidence=tuple(random.integers(0, 256, (SIDE, SIDE), np.uint8) for _ in range(3)),
            scores=(0.1, 0.2, 0.3),
        )


@pytest.mark.slow
def test_two_hundred_images_load_in_two_seconds(chromium: Browser, run: Path, tmp_path: Path) -> None:
    stages = read_run(str(run)).stages
    shown = [sections.example_of(example, stages, CLASSES, COLOURS) for example in examples(IMAGES)]
    file = tmp_path / "page.html"
    seen = sections.Seen(shown, [], "", CLASSES, COLOURS, [])
    file.write_text(render("many", "", stages, {"images": sections.images(seen)}))
    took = []
    for _ in range(3):
        started = time.perf_counter()
        chromium.open(file)
        chromium.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        took.append(time.perf_counter() - started)
    assert chromium.value("document.images.length") == IMAGES * 11
    assert min(took) < LIMIT_S, f"{took} s, {file.stat().st_size / 1e6:.1f} MB"
    assert (chromium.requests(), chromium.complaints()) == ([file.as_uri()], [])


def test_the_page_is_whole_in_a_browser_light_and_dark(chromium: Browser, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_report(str(run), str(file), images=6)
    shots = []
    for dark in (False, True):
        chromium.open(file, dark=dark)
        assert (chromium.requests(), chromium.complaints()) == ([file.as_uri()], [])
        assert chromium.value("document.compatMode") == "CSS1Compat"
        shots.append(chromium.screenshot())
        chromium.value("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
        broken = "Promise.all([...document.images].map(image => image.decode().then(() => 0, () => 1)))"
        assert not any(chromium.value(broken)), "every picture can be decoded"
    assert shots[0] != shots[1]


def test_a_narrow_window_scrolls_in_one_direction_only(chromium: Browser, run: Path, tmp_path: Path) -> None:
    """Every stage's pictures and charts are inside it, too."""
    file = tmp_path / "page.html"
    write_report(str(run), str(file), images=3)
    chromium.open(file, width=390)
    assert chromium.value("document.documentElement.scrollWidth") <= 390
    right = "[...document.querySelectorAll('img, .plot, .bars')].map(shown => shown.getBoundingClientRect().right)"
    assert max(chromium.value(right)) <= 390
    tops = (
        "[...document.querySelector('article').querySelectorAll('.prediction')].map(p => p.getBoundingClientRect().top)"
    )
    assert len(chromium.value(tops)) == 3 and len(set(chromium.value(tops))) == 1, "stages stand side by side"


def test_nothing_is_empty_in_a_screenshot_of_the_whole_page(chromium: Browser, run: Path, tmp_path: Path) -> None:
    """No picture, no chart, and no part without a heading that can be seen."""
    file = tmp_path / "page.html"
    write_report(str(run), str(file), images=30)
    chromium.open(file, width=1000)
    parts = "[...document.querySelectorAll('.picture img, .plot, .bars svg, main h2')]"
    boxes = chromium.value(f"{parts}.map(part => part.getBoundingClientRect()).map(r => [r.x, r.y, r.right, r.bottom])")
    with Image.open(io.BytesIO(chromium.screenshot(whole=True))) as shot:
        seen = np.asarray(shot.convert("L"))
    assert len(boxes) > 90 and max(box[3] for box in boxes) <= len(seen)
    empty = [box for box in boxes if np.ptp(seen[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])]) < 30]
    assert empty == []


def test_the_menu_lands_where_it_says(chromium: Browser, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_report(str(run), str(file), images=6)
    for width in (390, 1200):
        chromium.open(file, width=width)
        chromium.value("document.documentElement.style.scrollBehavior = 'auto'")
        for target in chromium.value("[...document.querySelectorAll('nav a')].map(link => link.hash)"):
            chromium.value(f"document.querySelector('nav a[href=\"{target}\"]').click()")
            bar = chromium.value("document.querySelector('nav').getBoundingClientRect().bottom")
            heading = chromium.value(f"document.querySelector('{target}-title').getBoundingClientRect().top")
            end = chromium.value("scrollY + innerHeight >= document.documentElement.scrollHeight - 1")
            assert bar <= heading <= bar + 60 or end, (target, width, bar, heading)


def test_everything_is_reached_and_used_by_keyboard(chromium: Browser, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_report(str(run), str(file), images=3)
    chromium.open(file)
    reached = []
    for _ in range(200):
        chromium.press("Tab", 9)
        name = chromium.value("document.activeElement.tagName + '#' + document.activeElement.id")
        if name.startswith("BODY"):
            break
        outline = "getComputedStyle(document.activeElement)"
        visible = chromium.value(f"{outline}.outlineStyle != 'none' && parseFloat({outline}.outlineWidth) >= 2")
        assert visible, f"the focus on {name} cannot be seen"
        reached.append(name)
    controls = "[...document.querySelectorAll('a, summary, input:not([type=radio]), [tabindex]')]"
    assert len(reached) > chromium.value(f"{controls}.filter(control => control.checkVisibility()).length")
    assert {"INPUT#size-medium", "INPUT#show-confidence", "INPUT#show-changes"} <= set(reached)
    shown = "document.querySelector('.picture.confidence').checkVisibility()"
    assert chromium.value(shown)
    chromium.value("document.getElementById('show-confidence').focus()")
    chromium.press(" ", 32)
    assert not chromium.value(shown), "the style sheet alone obeys the box"


def test_a_run_on_s3_gets_its_page_there(bucket: str, run: Path) -> None:
    for file in run.rglob("*"):
        if file.is_file() and file.suffix != ".pt":
            storage.write_bytes(f"{bucket}/{file.relative_to(run)}", file.read_bytes())
    written = write_report(bucket, images=3)
    assert written.uri == f"{bucket}/report.html" and written.missing == ()
    assert len(storage.read_bytes(written.uri)) == written.size


def test_the_page_becomes_an_artifact_of_the_run_in_mlflow(run: Path, tmp_path: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry = open_registry(RegistrySettings(tracking_uri=uri))
    run_id = registry.close_run("key", "FINISHED", {})
    storage.write_json(str(run / "run.json"), {"run_key": "key"})
    written = write_report(str(run), str(tmp_path / "page.html"))
    assert log_page(str(run), written.uri, written.finished, uri) is None
    found = list((tmp_path / "mlartifacts" / run_id).rglob("report.html"))
    assert [path.read_bytes() for path in found] == [(tmp_path / "page.html").read_bytes()]
