"""What README.md and docs/ say is so: their links lead somewhere, their generated pages are current, their code runs."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_configuration_reference_is_current() -> None:
    written = runpy.run_path(str(DOCS / "make_configuration.py"))
    assert written["page"]() == (DOCS / "configuration.md").read_text(), "run python docs/make_configuration.py"


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub and MkDocs name them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["add-an-encoder", "add-a-format", "add-an-augmentation"])
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
