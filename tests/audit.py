"""Known holes in what is installed: `python -m tests.audit`, or `make audit`. Asks the database of OSV through pip-audit.

Fails on every finding that tests/audit_ignored.txt does not name. Where the database cannot be reached, nothing is known and
nothing fails. Lists the container images and the workflow actions too, which OSV does not know: look them up by hand.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DATABASE = "https://api.osv.dev/v1/query"
ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"^ *(?:- )?(?:image: |uses: |ARG BASE=)(\S+)", re.MULTILINE)
IGNORED = Path(__file__).with_name("audit_ignored.txt")
PROBE_S, ANSWER_S, LIMIT_S = 5, 10, 300


def ignored(text: str) -> dict[str, str]:
    """Lines of "ID reason" by id; # begins a comment. Raises ValueError for an id without a reason."""
    found = {}
    for line in text.splitlines():
        identifier, _, reason = line.partition("#")[0].strip().partition(" ")
        if identifier and not reason.strip():
            raise ValueError(f"{identifier}: say behind it why it may be ignored")
        if identifier:
            found[identifier] = reason.strip()
    return found


def reachable(database: str) -> bool:
    """Any answer, a refusal too, shows that somebody is there."""
    try:
        urllib.request.urlopen(database, timeout=PROBE_S).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


def findings(packages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[set[str], str]]:
    """What pip-audit found: all names of a hole, and a line."""
    for package in packages:
        for hole in package.get("vulns", []):
            fixed = ", ".join(hole["fix_versions"]) or "no version yet"
            line = f"{package['name']} {package['version']}: {hole['id']}, mended in {fixed}"
            yield {hole["id"], *hole.get("aliases", [])}, line


def audit(database: str, reasons: Mapping[str, str], options: Sequence[str] = ()) -> int:
    """The exit code; prints what was found."""
    if not reachable(database):
        print(f"audit: skipped, {database} cannot be reached from here")
        return 0
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--vulnerability-service",
        "osv",
        "--osv-url",
        database,
        "--format",
        "json",
    ]
    command += ["--progress-spinner", "off", "--timeout", str(ANSWER_S), *(options or ["--local", "--skip-editable"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    report = None
    with contextlib.suppress(json.JSONDecodeError):
        report = json.loads(done.stdout)["dependencies"]
    if report is None:
        print(f"audit: failed: {done.stderr.strip()[-500:]}")
        return 1
    found = list(findings(report))
    named = set().union(*(names for names, _ in found))
    for identifier in sorted(reasons.keys() - named):
        print(f"audit: {identifier} is not found any more: take it out of {IGNORED.name}")
    wrong = [line for names, line in found if names.isdisjoint(reasons)]
    for line in wrong or [f"{len(report)} packages, {len(found)} findings, of which all are ignored with a reason"]:
        print(f"audit: {line}")
    return 1 if wrong else 0


def third_party() -> list[str]:
    """A line for each image and action that our files name: what it is, and whether it is pinned."""
    places = [*(ROOT / "cluster").rglob("*.yaml"), ROOT / "cluster/Dockerfile", *(ROOT / ".github").rglob("*.yml")]
    named = {name for file in places for name in NAMED.findall(file.read_text())}
    return [f"{name}  {_pinned(name)}" for name in sorted(named)]


def _pinned(name: str) -> str:
    if re.search(r"@(?:sha256:[0-9a-f]{64}|[0-9a-f]{40})$", name):
        return "pinned"
    return "built here" if re.search(r"(?:^|/)threestage(?:-mlflow)?:", name) else "NOT PINNED"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--database", default=DATABASE, metavar="URL")
    for line in third_party():
        print(f"audit: {line}")
    return audit(parser.parse_args().database, ignored(IGNORED.read_text()))


if __name__ == "__main__":
    sys.exit(main())
