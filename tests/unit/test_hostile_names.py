"""Names of classes, data sets and files are text from strangers: no page, card, line or log takes them for commands."""

import html
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from threestage.cli.options import Terminal
from threestage.cli.progress import StageProgress
from threestage.config import load
from threestage.mlflow_sync.packing import write_card
from threestage.mlflow_sync.records import StageRecord
from threestage.models.export import ModelCard
from threestage.models.settings import NetworkSettings
from threestage.run import local_main
from threestage.run.backend import RunCallbacks

EVIL = "x<script>a</script>![p](http://h/t.png)|`c`\n# t \x1b]8;;http://h\x07l\x1b[2J\u202egnp"
COMMANDS = set("\x1b\x07\u202e")


def record() -> StageRecord:
    images = {"name": EVIL, "images": 9, "digest": "<img src=x>"}
    masks = {"uri": EVIL, "digest": "<b>", "images": 3, "rejected": 1, "statistics": {"mean_confidence": 0.5}}
    lineage = {
        "run": EVIL, "stage": "stage2", "model_digest": EVIL, "code_version": EVIL, "labelled": images, "validation": images,
        "data": {"root": EVIL, "name": EVIL, "version": 2, "digest": "<i>" * 9}, "split_seed": 0,
        "teacher": {"stage": EVIL, "model_digest": "<u>", "model": EVIL}, "learnt_from": masks, "confidence_threshold": 0.5,
        "made": masks,
    }  # fmt: skip
    config = load("demo", ["data.root=data"]).model_dump(mode="json")
    summary = {"mean_iou": 0.5, f"iou/{EVIL}": 0.5}
    return StageRecord(EVIL, EVIL, "stage2", "a", config, [], "", summary, {"run": EVIL}, lineage)


@pytest.mark.parametrize("no_program", [None, EVIL])
def test_a_model_card(no_program: str | None) -> None:
    card = ModelCard(
        network=NetworkSettings(encoder="test_resnet", batch_norm="live"),
        classes=(EVIL, "b"),
        colours=((0, 0, 0), (1, 1, 1)),
        downscale=2,
        stage="stage2",
    )
    text = write_card(EVIL, card, record(), no_program=no_program)
    assert not set(text) & COMMANDS
    prose = re.sub(r"(?m)^    .*$", "", text)  # indented lines are code, which is shown as it is
    assert "<" not in prose and "](" not in prose and "`c`" not in prose
    assert html.unescape(prose).count("<script>a</script>![p](http://h/t.png)|`c` # t \\x1b]8;;") >= 5
    assert len(re.findall(r"(?m)^#", text)) == 6  # the card's own headings


def test_the_lines_of_a_local_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(config: Any, out: str, local: bool, on: RunCallbacks) -> Mapping[str, Any]:
        on.on_metrics("stage1", {"step": 1, EVIL: 0.5})
        on.on_warning(EVIL)
        on.on_progress(EVIL, 1, 2)
        return {"stages": {"stage1": {EVIL: 1}}, "no_verdict": EVIL}

    monkeypatch.setattr(local_main, "run", run)
    assert local_main.main(["demo", "--out", str(tmp_path)]) == 0
    assert local_main.main([EVIL, "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert not set(shown.out + shown.err) & COMMANDS and shown.out.count("\\x1b]8;;") == 4


def test_lines_of_progress() -> None:
    file = io.StringIO()
    with StageProgress(load("demo", ["data.root=data"]), Terminal(file=file, width=200)) as progress:
        progress.on_progress(EVIL, 1, 2)
        progress.warn(EVIL)
    assert not set(file.getvalue()) & COMMANDS and file.getvalue().count("\\x1b]8;;") == 2


def test_warnings_before_there_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from threestage import __main__ as start
    from threestage.mlflow_sync.model_registry import _to_stderr

    _to_stderr(EVIL)
    monkeypatch.setenv("THREESTAGE_EXPECTED_ENVIRONMENT", f"{EVIL}?,{EVIL}")
    with pytest.raises(SystemExit):
        start.main_on_cluster()
    assert not set(capsys.readouterr().err) & COMMANDS
