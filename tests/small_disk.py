"""A file system of some megabytes, for tests that fill it: a mount of their own, which needs root or is skipped."""

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, options: str = "size=64m") -> Iterator[Path]:
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill(folder: Path) -> None:
    """Leave no room."""
    with contextlib.suppress(OSError), (folder / "filling").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(2**16))
    with pytest.raises(OSError) as caught:
        (folder / "more").write_bytes(bytes(2**16))
    assert caught.value.errno == errno.ENOSPC
    (folder / "more").unlink(missing_ok=True)
