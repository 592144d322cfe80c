"""What listens on this machine, as the kernel says it."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def listening(processes: set[int]) -> Iterator[tuple[str, int, str]]:
    """(address, port, program) of every TCP socket on which one of the processes listens."""
    sockets = dict(_listeners())
    for process in processes:
        with contextlib.suppress(OSError):
            program = Path(f"/proc/{process}/cmdline").read_text(errors="replace").replace("\0", " ")[:100]
            for file in Path(f"/proc/{process}/fd").iterdir():
                with contextlib.suppress(OSError):
                    name = os.readlink(file)
                    if name in sockets:
                        yield *sockets[name], program


def _listeners() -> Iterator[tuple[str, tuple[str, int]]]:
    for table, family, size in (("tcp", socket.AF_INET, 4), ("tcp6", socket.AF_INET6, 16)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            address, port = local.split(":")
            if state == "0A":
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, 2 * size, 8)]
                yield f"socket:[{rest[5]}]", (socket.inet_ntop(family, b"".join(words)), int(port, 16))
