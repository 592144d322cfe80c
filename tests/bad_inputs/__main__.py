"""Run every bad input and write the table of docs/reliability.md: python -m tests.bad_inputs [AREA …]"""

import datetime
import os
import re
import sys
import tempfile
from pathlib import Path

from tests.bad_inputs import all_bad_inputs

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- bad inputs: begin -->", "<!-- bad inputs: end -->"
ROW = re.compile(r"^\| ([a-z_]+) \| (.+) \| (.+) \|$", re.M)


def documented(page: str) -> list[tuple[str, str, str]]:
    """(area, what, outcome) of each row of the table."""
    return [row for row in ROW.findall(page.split(BEGIN)[1].split(END)[0]) if row[0] != "area"]


def main() -> None:
    wanted, rows, failed = sys.argv[1:], [], 0
    before = {(area, what): outcome for area, what, outcome in documented(PAGE.read_text())}
    for area, found in all_bad_inputs().items():
        for bad in found:
            outcome = before.get((area, bad.what), "not run")
            if not wanted or area in wanted:
                with tempfile.TemporaryDirectory() as folder:
                    os.chdir(folder)
                    outcome = bad.try_it(Path(folder))
                    os.chdir(PAGE.parent)
                failed += outcome != bad.expected
                print(f"{'ok   ' if outcome == bad.expected else 'WRONG'} {area}: {bad.what}: {outcome}", flush=True)
            rows.append(f"| {area} | {bad.what} | {outcome} |")
    head = f"Run on {datetime.date.today()}.\n\n| area | input | outcome |\n|---|---|---|"
    text = PAGE.read_text()
    PAGE.write_text(text.split(BEGIN)[0] + "\n".join([BEGIN, head, *rows, END]) + text.split(END)[1], encoding="utf-8")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
