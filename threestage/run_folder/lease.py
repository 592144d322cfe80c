"""One driver for a run or a sweep: it holds `lease.json` below the folder's prefix, and renews it while it lives. After a
SIGKILL the lease stands still, and the next command takes it over.

No clock is compared with that of another machine. Whoever finds a lease looks at it for as long as MISSED beats take: one
that changes is alive, one that does not is dead and may be taken over. What is taken over is found out at the next beat.

Two that begin together both write, wait until the other's write must have been done, and read: the file names one of
them. Where a store was so slow that both went on, the one that the file does not name stops at its next beat.
"""

import contextlib
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from threestage.data import storage
from threestage.errors import InputError, StageFailure, Warn
from threestage.settings import Settings

NAME = "lease.json"
MOST_BYTES = 2**16
INTERVAL_S = 10.0
MISSED = 4
END_S = 5.0  # an end waits so long for the store
SETTLE_S = {"s3": 1.0, "local": 0.25}
LOST_SIGNAL = (
    signal.SIGRTMIN + 7
)  # nobody else's; unlike SIGINT it is neither ignored behind `&` nor blocked in a Ray job


class Holder(Settings):
    """What lease.json says: who drives. `machine` and `process` name that process for good, "" where the system cannot.
    `progress`: where its run is (run/event_log.py)."""

    format: int = 1
    id: str
    host: str
    pid: int
    machine: str
    process: str
    started: str
    beat: int = 0
    interval_s: float = INTERVAL_S
    progress: dict[str, Any] = Field({})

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


class _Lost(BaseException):
    """Raised in the main thread when another driver has taken the lease; no `except Exception` may keep it."""


class Lease:
    """A lease that is held. `lost`: one line when another driver has taken it, else None. `progress`: what others may read of
    the run with every beat."""

    def __init__(self, out: str, interval_s: float = INTERVAL_S) -> None:
        self.lost: str | None = None
        self.progress: Callable[[], dict[str, Any]] = dict
        self._out = storage.absolute(out)
        self._uri = storage.join(self._out, NAME)
        self._holder = _this_process(interval_s)
        self._beats = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __str__(self) -> str:
        return str(self._holder)

    def check(self) -> None:
        """Raises StageFailure when another driver has taken the lease."""
        if self.lost is not None:
            raise StageFailure(self.lost, "run/taken-over")

    def take(self, warn: Warn) -> None:
        """Raises InputError when another driver holds it."""
        if (holder := current_holder(self._out, warn)) is None:
            self._write({})
            time.sleep(SETTLE_S["s3" if storage.is_s3(self._uri) else "local"])
            holder = self._other()
        if holder is not None:
            raise _taken(self._out, holder)

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Renew it from a thread; once lost, `_Lost` is raised in the main thread, if that is the one that called."""
        here = threading.get_ident() if threading.current_thread() is threading.main_thread() else None
        self._thread = threading.Thread(target=self._keep, args=(here,), name="lease", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join(END_S)

    def release(self) -> None:
        """Remove it, unless it is another's. Where the store fails, or does not answer, it stays, and is dead: that must not end
        a finished run, nor hold up its end."""
        thread = threading.Thread(target=self._remove, name="lease", daemon=True)
        thread.start()
        thread.join(END_S)

    def _remove(self) -> None:
        with contextlib.suppress(Exception):
            if self._other() is not None:
                return
            storage.delete(self._uri, self._out)
            if not storage.is_s3(self._out):
                os.rmdir(storage.filesystem(self._out)[1])  # where the driver was refused before it wrote anything

    def _keep(self, main_thread: int | None) -> None:
        while not self._ended.wait(self._holder.interval_s):
            try:
                self._renew()
            except (OSError, InputError):  # tried again at the next beat: an outage does not end a run
                continue
            if self.lost is not None:
                if main_thread is not None:
                    signal.pthread_kill(main_thread, LOST_SIGNAL)
                return

    def _renew(self) -> None:
        """Nothing is asked of the store between the look and the write."""
        progress = self.progress()
        other = self._other()
        if other is None:
            self._write(progress)
        else:
            self.lost = f"{self._out}: another driver has taken this run over ({other}), this one stops"

    def _other(self) -> Holder | None:
        """Whose it is, when it is another's. One that has vanished is written again."""
        content = _read(self._uri)
        if content is None:
            return None
        holder = _parsed(content)
        return None if holder.id == self._holder.id else holder

    def _write(self, progress: dict[str, Any]) -> None:
        self._beats += 1
        told = {"beat": self._beats, "progress": progress}
        storage.write_json(self._uri, self._holder.model_copy(update=told).model_dump())


@contextlib.contextmanager
def held(out: str, warn: Warn, interval_s: float = INTERVAL_S) -> Iterator[Lease]:
    """Be the only driver of the folder `out` while the context is open.

    Raises InputError when another one lives, which takes up to MISSED intervals to find out where it runs, or ran, on
    another machine. When another one takes the lease over, the main thread stops with StageFailure wherever it is; any
    other thread is to call `check`. A store that does not answer costs nothing but the beats.
    """
    lease = Lease(out, interval_s)
    lease.take(warn)
    try:
        with _interruptible(), lease.beating():
            yield lease
    except _Lost:
        if lease.lost is None:  # that of a folder around this one
            raise
    finally:
        lease.release()
    lease.check()


def refuse_driven(out: str) -> str:
    """Raises InputError when a driver works on a folder that has a lease; else says what became of the last one."""
    said: list[str] = []
    if (holder := current_holder(out, said.append)) is not None:
        raise _taken(out, holder)
    return said[-1] if said else "none"


def _taken(out: str, holder: Holder) -> InputError:
    return InputError(
        f"{out}: another driver works on it ({holder}): wait for it, stop it, or give another --out",
        "run/another-driver",
    )


def current_holder(out: str, warn: Warn) -> Holder | None:
    """The driver that works on a folder, None when there is none or it is dead; a dead one is warned about."""
    uri = storage.join(storage.absolute(out), NAME)
    content = _read(uri)
    if content is None:
        return None
    holder = _parsed(content)
    alive = _alive_here(holder)
    if alive:
        return holder
    if alive is None:
        patience = MISSED * min(holder.interval_s, INTERVAL_S)
        warn(f"{out} has a driver ({holder}): looking for up to {patience:.0f} s whether it lives")
        found = _watch(uri, content, patience)
        if found != content:
            return None if found is None else _parsed(found)
    warn(f"{out}: its last driver ({holder}) is dead, this one takes over")
    return None


def last_holder(out: str) -> Holder | None:
    """Whoever holds the lease of a folder, dead or alive; None where nobody does."""
    content = _read(storage.join(storage.absolute(out), NAME))
    return None if content is None else _parsed(content)


class LeaseObserver:
    """Sees from outside whether the drivers of folders live, and changes nothing. A driver elsewhere lives once its lease has
    changed, and is dead once it has not for as long as MISSED beats take."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._beating = set[str]()

    def look(self, out: str) -> tuple[Holder | None, bool | None]:
        """The holder, and whether it lives; None: that is not known yet, look again."""
        content = _read(storage.join(storage.absolute(out), NAME))
        if content is None:
            return None, False
        holder = _parsed(content)
        before, since = self._seen.setdefault(out, (content, time.monotonic()))
        if content != before:
            self._seen[out] = (content, time.monotonic())
            self._beating.add(out)
            return holder, True
        alive = _alive_here(holder)
        if alive is None and time.monotonic() - since > MISSED * min(holder.interval_s, INTERVAL_S):
            alive = False
        return holder, alive if alive is not None or out not in self._beating else True


def _watch(uri: str, content: bytes, patience_s: float) -> bytes | None:
    """The first other content of a file (None: it has vanished), or the same when the patience is over."""
    deadline = time.monotonic() + patience_s
    now: bytes | None = content
    while now == content and time.monotonic() < deadline:
        time.sleep(min(1.0, patience_s / 20))
        now = _read(uri)
    return now


def _read(uri: str) -> bytes | None:
    try:
        return storage.read_small(uri, MOST_BYTES)
    except FileNotFoundError:
        return None


def _parsed(content: bytes) -> Holder:
    """Also of a lease that a later version wrote, or nobody did: it has a holder, nobody knows which."""
    try:
        return Holder.model_validate(storage.parse_json(content, NAME))
    except (InputError, ValidationError):
        return Holder(id="", host="an unknown host", pid=0, machine="", process="", started="an unknown time")


def _this_process(interval_s: float) -> Holder:
    return Holder(
        id=secrets.token_hex(8),
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        process=_started(os.getpid()) or "",
        started=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        interval_s=interval_s,
    )


def _machine() -> str:
    """Names the boot of this machine and the container: processes of the same one see each other's ids."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/" + os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None when it does not live."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None


def _alive_here(holder: Holder) -> bool | None:
    """Whether the process lives, where it is one of this machine; None where that cannot be seen from here."""
    if not holder.machine or holder.machine != _machine():
        return None
    return _started(holder.pid) == holder.process


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """LOST_SIGNAL raises `_Lost` in the main thread; elsewhere no signal can be handled, and none is sent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def lost(*_: Any) -> None:
        raise _Lost

    before = signal.signal(LOST_SIGNAL, lost)
    try:
        yield
    finally:
        signal.signal(LOST_SIGNAL, before)
