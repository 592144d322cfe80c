"""The files of a labelling tool's export, read within limits. Only files that the listing of its folder has are opened."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from threestage.data import safe_walk, storage
from threestage.data.formats import Stamps, files_below
from threestage.data.pairs import IMAGE_SUFFIXES, MASK_SUFFIXES, Paths, stems
from threestage.data.parallel import map_ahead
from threestage.errors import InputError

MAX_FILE_BYTES = 2**26
"""Of a file that is read whole."""
THREADS = 8
CODE = "data/annotations"

Model = TypeVar("Model", bound=BaseModel)


class ExportFiles:
    """`place`: the file or folder that was given. `paths`: path below it → URI. `source`: the folder of the images."""

    def __init__(self, place: str, paths: Paths, stamps: Stamps, source: str | None = None) -> None:
        self.place = place
        self._source = source
        for uri in paths.values():
            if (why := safe_walk.WHY_NOT.get(stamps.get(uri, (0,))[0])) is not None:
                raise InputError(f"{uri}: {why}; take it out of the export's folder", "data/link")
        self.paths = paths
        self._stamps = stamps

    def ending(self, *suffixes: str) -> dict[str, str]:
        """The files with such a suffix, in either case, in the order of their paths."""
        return {path: uri for path, uri in self.paths.items() if PurePosixPath(path).suffix.lower() in suffixes}

    def beside(self, uri: str) -> "ExportFiles":
        """The files in the folder of a file, or in a folder."""
        folder = uri.rsplit("/", 1)[0] if storage.is_file(uri) else uri
        return ExportFiles(self.place, *files_below(folder, "masks"))

    def image_ids(self) -> list[str]:
        """Of the source's images, less those that are files of the export."""
        if self._source is None:
            return []
        images, _ = files_below(self._source, "images")
        ours = set(self.paths.values())
        others = {path: uri for path, uri in images.items() if uri not in ours}
        return list(stems(others, IMAGE_SUFFIXES) or stems(images, IMAGE_SUFFIXES - MASK_SUFFIXES))

    def mask(self, uri: str) -> dict[str, Any]:
        """How a region names a file: the URI, and what changes when the file does."""
        return {"uri": uri, "stamp": self._stamps.get(uri)}

    def read_all(self, files: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
        """(path, content) of files in order, read by threads. Raises InputError for one of more than MAX_FILE_BYTES."""

        def read(file: tuple[str, str]) -> tuple[str, bytes]:
            return file[0], storage.read_small(file[1], MAX_FILE_BYTES)

        return map_ahead(read, files.items(), THREADS)

    def wrong(self, expected: str) -> InputError:
        """What to tell the user when nothing of a format is there."""
        return InputError(f"masks={self.place}: {expected}; correct the path or --format", CODE)


class ToolModel(BaseModel):
    """A part of a tool's file; keys that we do not read are left out."""


def as_model(value: Any, model: type[Model], where: str) -> Model:
    """Raises InputError, which begins with `where`, for a value of another form."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        raise InputError(
            f"{where}: is not as the tool writes it ({place}: {first['msg']}); export it again", CODE
        ) from None
