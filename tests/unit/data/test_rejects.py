"""Bad images are listed for programs and for people, whose spreadsheet must not run a file's name."""

import csv
from pathlib import Path

from threestage.data.rejects import Reject, RejectList, csv_uri, read_rejects


def test_the_same_list_as_csv(tmp_path: Path) -> None:
    uri = str(tmp_path / "rejects.parquet")
    names = ["=1+2", "plain, with a comma", "a\nb"]
    found = [Reject(image_id=name, source=f"s3://b/{name}", reason="is empty [image/undecodable]") for name in names]
    RejectList(found).write_for_people(uri, str(tmp_path))
    with open(csv_uri(uri), newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["image_id", "source", "reason"] and len(rows) == len(read_rejects(uri)) == 3
    assert {row[0] for row in rows} == {"'=1+2", "plain, with a comma", "a b"}


def test_without_rejects_no_csv_stays(tmp_path: Path) -> None:
    uri = str(tmp_path / "rejects.parquet")
    Path(csv_uri(uri)).write_text("of an earlier try")
    RejectList().write_for_people(uri, str(tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["rejects.parquet"] and read_rejects(uri) == []
