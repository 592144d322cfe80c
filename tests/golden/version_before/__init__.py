"""Folders that the version before has written, in folders.tar.xz: what users have must be read and continued.

    data/         a data set of version 2: an image got its mask later, a file was refused, an index is left
    more/         a folder in the layout of camvid with one more image
    config.yaml   the settings of both runs, whose steps are few
    run/          a finished run
    stopped/      the same run, stopped by SIGTERM in stage 2 behind its checkpoint
    model/        the model of the finished run's stage 3
    predictions/  masks and confidences of that model for the data set
    space.yaml, sweep/  a sweep whose driver was killed in its last trial: two trials finished, one failed
    machine.json  the machine that made all this

make.py makes it. Its paths are below PLACE; `restored` puts the place where the folders now lie in it.
"""

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ARCHIVE = Path(__file__).with_name("folders.tar.xz")
PLACE = "/tmp/threestage-version-before"


def restored(to: Path) -> Path:
    """Unpack the folders into an empty folder, with their paths there."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(to, filter="data")
    for file in to.rglob("*"):
        if file.suffix in (".json", ".yaml"):
            file.write_text(file.read_text().replace(PLACE, str(to)))
        elif file.name == "pool.parquet":
            _move_pool(file, to)
    return to


def _move_pool(file: Path, to: Path) -> None:
    """Move the files that a run's list of the pool names; the list's schema and metadata stay."""
    table = pq.read_table(file)
    place = table.schema.get_field_index("uri")
    uris = [uri.replace(PLACE, str(to)) for uri in table.column("uri").to_pylist()]
    pq.write_table(table.set_column(place, table.schema.field("uri"), pa.array(uris)), file)
