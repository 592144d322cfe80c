"""What README.md and docs/ say is so: their links lead somewhere, their generated pages are current, their code runs."""

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from tests.package_source import FILES, tree_of
from tests.refusals import refused
from threestage.checks.preflight import check_shares
from threestage.config import load, preset_headers
from threestage.data.synthetic import write_scenes
from threestage.models.network import check_settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    """`mkdocs build --strict` checks docs/ too, but not what README.md says, nor how GitHub finds a file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def test_the_configuration_of_the_readme_takes_timms_weights(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "one.yaml").write_text(text)
    network = load(str(tmp_path / "one.yaml")).network
    assert network.pretrained
    check_settings(network)


def test_pages_read_well() -> None:
    """Short lines, short sentences, plain words."""
    prose = runpy.run_path(str(DOCS / "check_prose.py"))
    found = {
        str(page.relative_to(ROOT)): prose["problems"](page.read_text(), page.name in prose["LINES_ONLY"])
        for page in prose["pages"]()
    }
    assert {page: problems for page, problems in found.items() if problems} == {}
    assert prose["problems"]("Mend it.\n\n" + 30 * "word " + "\n\n```\n" + 101 * "x" + "\n```\n")[1:] == [
        "“Mend” in “…Mend”: write fix"
    ]
    assert prose["problems"](f"{20 * 'words '}\n\n| {101 * 'x'} |\n\n[x](https://{101 * 'x'})") == [
        "line 1: 120 characters"
    ]


FORMS = {"a.b=c", "stage1.stps=3", "steps=30"}  # the shape of a setting, or a mistake in one


def commands_in(page: Path) -> Iterator[list[str]]:
    """Words of the threestage commands of a page, and of what is to be added to them; without what a shell does with them."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```(?!yaml|python)\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    for line in lines:
        if re.match(r"\$? ?(threestage|--set) ", line):
            yield shlex.split(re.split(r" > | \| | # ", line)[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_of_commands_are_some_that_a_run_takes(page: Path) -> None:
    for words in commands_in(page):
        settings = [value for flag, value in pairwise(words) if flag == "--set"]
        named = [word for word in words if word in preset_headers()]
        if (
            settings
            and not FORMS.intersection(settings)
            and "…" not in "".join(settings)
            and (named or words[0] == "--set")
        ):
            config = load(named[0] if named else "own_images", settings)
            for stage in config.stage_names:
                check_shares(config, stage)


def test_the_configuration_reference_is_current() -> None:
    written = runpy.run_path(str(DOCS / "make_configuration.py"))
    assert written["page"]() == (DOCS / "configuration.md").read_text(), "run python docs/make_configuration.py"


def test_the_picture_of_the_views_is_current(tmp_path: Path) -> None:
    """On average within two levels: another machine may round otherwise."""
    drawn = runpy.run_path(str(DOCS / "make_pictures.py"))
    drawn["views"](str(tmp_path / "views.png"))
    with Image.open(tmp_path / "views.png") as new, Image.open(DOCS / "pictures/views.png") as shown:
        assert new.size == shown.size
        difference = ImageChops.difference(new.convert("RGB"), shown.convert("RGB"))
        assert max(ImageStat.Stat(difference).mean) < 2, "run python docs/make_pictures.py RUN, see there"


def test_pictures_are_small_and_shown() -> None:
    pages = "".join(page.read_text() for page in DOCS.glob("*.md"))
    for picture in (DOCS / "pictures").iterdir():
        assert picture.stat().st_size < 100_000, picture.name
        assert f"](pictures/{picture.name})" in pages


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub and MkDocs name them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    ["add-a-format", *(pytest.param(p, marks=pytest.mark.slow) for p in ("add-an-encoder", "add-an-augmentation"))],
)
def test_worked_examples_run(page: str, tmp_path: Path) -> None:
    """Make a page's changes to a copy of the package, then run its code there."""
    shutil.copytree(ROOT / "threestage", tmp_path / "threestage", ignore=shutil.ignore_patterns("__pycache__"))
    text = (DOCS / f"{page}.md").read_text()
    for path, code in re.findall(r'```python title="(\S+)"\n(.*?)```', text, re.DOTALL):
        (tmp_path / path).write_text(code)
    for path, hunks in re.findall(r"```diff\n--- a/(\S+)\n[^\n]*\n(.*?)```", text, re.DOTALL):
        change(tmp_path / path, hunks)
    (tmp_path / "page.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    ended = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr


def change(file: Path, hunks: str) -> None:
    """Apply the hunks of a diff without line numbers: what each takes away stands once in the file."""
    text = file.read_text()
    for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
        lines = [line if line.strip("\n") else f" {line}" for line in hunk.splitlines(keepends=True)]
        old, new = ("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(old) == 1, f"{file}: the page changes what is not there (any more):\n{old}"
        text = text.replace(old, new)
    file.write_text(text)


Example = Callable[..., str]
TWO_STEPS = [
    *("stages=1", "stage1.steps=2", "data.labelled=8", "augment.crop_size=[32,32]"),
    *("pseudo_mask.on_collapse=ignore", "pseudo_mask.final_stage=false"),
    *("network.encoder=test_resnet", "network.pretrained=false", "network.batch_norm=live", "network.head_width=16"),
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Run one of docs/examples with arguments; what it printed."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(DOCS / f"examples/{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_shown() -> None:
    """On the page, with its lines: about ten, and less the imports."""
    page = (DOCS / "examples.md").read_text()
    for file in (DOCS / "examples").glob("*.py"):
        assert f"](examples/{file.name})" in page, file.name
        body = [line for line in file.read_text().splitlines()[2:] if line and "import " not in line]
        assert len(body) <= 10, file.name


def test_examples_of_data_and_sweeps(example: Example, tmp_path: Path) -> None:
    write_scenes(str(tmp_path), {"train": 6}, seed=0)
    folders, classes = [tmp_path / "train/images", tmp_path / "train/masks"], tmp_path / "class_map.yaml"
    (tmp_path / "train/images/broken.jpg").write_bytes(b"no image")
    with refused("data/bad-images", "1 of 7 images"):
        example("own_images", *folders, classes, tmp_path / "data")
    (tmp_path / "train/images/broken.jpg").unlink()
    assert "6 images and 6 masks added, 0 left out" in example("own_images", *folders, classes, tmp_path / "data")
    assert "'pseudo_mask.confidence_threshold': 0" in example("sweep_space", "thresholds", "demo")
    with refused("sweep/asha", "evaluate_every"):
        example("sweep_space", "thresholds", "demo", "training.evaluate_every=800")


@pytest.mark.slow
def test_examples_from_training_to_a_pulled_model(
    example: Example, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    assert "'train'" in example("make_data", "data")
    assert "stage1" in example("train", "data", "run", *TWO_STEPS)
    assert "run/report.html" in example("show_report", "run")
    assert "6 images predicted, 0 left out" in example("predict_folder", "run", "data-files/val/images", "predicted")
    assert "background" in example("predict_one", "run/stage1", "data-files/val/images/val_00000.jpg", "mask.png")
    assert "mean IoU" in example("score", "run/stage1", "data")
    assert "own_images 1 stage1" in example("register_and_pull", "run", f"sqlite:///{tmp_path}/mlflow.db", "pulled")
    assert {"model.safetensors", "model.json", "README.md"} <= {file.name for file in Path("pulled").iterdir()}


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("default")  # Ray's own
def test_the_example_on_ray(
    example: Example, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    example("make_data", "data")
    assert "stage1" in example("train_on_ray", "data", "run", *TWO_STEPS)


def test_every_warning_of_troubleshooting_is_one_of_the_code() -> None:
    """Errors are listed by their codes (test_error_codes.py); warnings have none."""
    known = templates()
    _, _, warnings = (DOCS / "troubleshooting.md").read_text().partition("\n## Warnings\n")
    messages = re.findall(r"^\| `(.+?)` \| ", warnings, re.MULTILINE)
    assert len(messages) >= 7
    wrong = []
    for message in messages:
        parts = message.split("…")
        longest = max(parts, key=len)
        if not any(stand_in_order(parts, template) for template in known if longest in template):
            wrong.append(message)
    assert not wrong


def stand_in_order(parts: list[str], text: str) -> bool:
    place = 0
    for part in parts:
        found = text.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return True


def templates() -> set[str]:
    """Every text in the package, with … for what is filled in."""
    found = set()
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"\{\w+\}", "…", node.value))
    return {re.sub("…+", "…", text) for text in found}
