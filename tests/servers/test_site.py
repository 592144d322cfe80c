"""The site of docs/ in a real browser, opened from its folder: readers have no server and perhaps no net."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import Browser
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
LETTERS = 9.0  # pixels of a diagram's smallest letters on a phone
BACKGROUND = "getComputedStyle(document.querySelector('img[src*=flow]')).colorScheme"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    return folder


@pytest.mark.slow
def test_the_search_finds_pages_and_nothing_comes_from_the_net(chromium: Browser, site: Path) -> None:
    chromium.open(site / "index.html")
    chromium.value("document.querySelector('[data-md-component=search-query]').focus()")
    chromium.call("Input.insertText", text="rejected")
    links = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    wait_for(lambda: any("report.html" in link for link in chromium.value(links)))
    assert all(url.startswith((site.as_uri(), "blob:")) for url in chromium.requests())
    assert chromium.complaints() == []


@pytest.mark.slow
def test_pages_fit_a_phone(chromium: Browser, site: Path) -> None:
    """Code wraps, diagrams can be read, and only wide tables scroll."""
    for page in ("index", "architecture", "report", "clusters", "configuration"):
        chromium.open(site / f"{page}.html", width=390)
        assert chromium.value("document.documentElement.scrollWidth") <= 390, page
        assert chromium.value("[...document.querySelectorAll('pre > code')].every(c => c.scrollWidth <= c.clientWidth)")
        scales = chromium.value("[...document.querySelectorAll('img[src$=svg]')].map(i => i.width / i.naturalWidth)")
        assert all(15 * scale >= LETTERS for scale in scales), page


@pytest.mark.slow
def test_diagrams_follow_the_colours_of_the_page(chromium: Browser, site: Path) -> None:
    chromium.open(site / "index.html")
    assert chromium.value(BACKGROUND) == "light"
    chromium.value("document.querySelector('label[for=__palette_1]').click()")
    assert chromium.value(BACKGROUND) == "dark"
    for drawn in ("flow", "architecture"):
        assert "prefers-color-scheme: dark" in (ROOT / f"docs/{drawn}.svg").read_text()
