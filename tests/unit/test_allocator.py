"""Tensors of one size again and again must not cost the system's work of mapping and clearing them each time."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from threestage.allocator import disable_malloc_trim

if sys.argv[1] == "keep":
    disable_malloc_trim()
faults = []
for _ in range(4):
    np.ones(2**26, np.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[3] - faults[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is what is set")
def test_freed_memory_is_used_again() -> None:
    faults = {how: _faults(how) for how in ("keep", "give back")}
    assert faults["keep"] < 100 < faults["give back"]


def _faults(how: str) -> int:
    """Page faults of two tensors of 64 MiB: 32 thousand where the system maps each, with pages of 4 KiB; huge pages would
    need 64, where a machine has some left."""
    small_pages = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}
    command = [sys.executable, "-c", CODE, how]
    return int(subprocess.run(command, env=small_pages, capture_output=True, text=True, check=True).stdout)
