"""`make audit` against a database of our own: what it finds fails, what is ignored needs a reason, no database is no failure."""

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.audit import IGNORED, audit, ignored

HOLE = {
    "id": "GHSA-aaaa",
    "aliases": ["CVE-2026-1"],
    "summary": "a hole",
    "affected": [
        {
            "package": {"name": "pillow", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}],
        }
    ],
}


class Database(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(405, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(200, {"vulns": [HOLE]} if asked["package"]["name"] == "pillow" else {})

    def _answer(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def database() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_findings_fail_unless_they_are_ignored(
    database: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = tmp_path / "pinned.txt"
    pinned.write_text("pillow==1.0\nnumpy==1.0\n")
    options = ["--requirement", str(pinned), "--no-deps", "--disable-pip"]
    run, done = subprocess.run, list[subprocess.CompletedProcess[str]]()

    def once(*arguments: Any, **settings: Any) -> subprocess.CompletedProcess[str]:
        """The same question takes seconds each time."""
        if not done:
            done.append(run(*arguments, **settings))
        return done[0]

    monkeypatch.setattr(subprocess, "run", once)
    assert audit(database, {}, options) == 1
    assert "audit: pillow 1.0: CVE-2026-1, mended in 99.0" in capsys.readouterr().out
    assert audit(database, {"GHSA-aaaa": "nobody calls it", "CVE-old": "gone"}, options) == 0
    said = capsys.readouterr().out
    assert "2 packages, 1 findings, of which all are ignored" in said and "CVE-old is not found any more" in said


def test_without_the_database_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit("http://127.0.0.1:9/", {}) == 0
    assert capsys.readouterr().out == "audit: skipped, http://127.0.0.1:9/ cannot be reached from here\n"


def test_what_is_ignored_has_a_reason() -> None:
    assert ignored("# words\n\nGHSA-1  because of this  # and that\n") == {"GHSA-1": "because of this"}
    with pytest.raises(ValueError, match="GHSA-1: say behind it why"):
        ignored("GHSA-1\n")
    assert all(ignored(IGNORED.read_text()).values())
