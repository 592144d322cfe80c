"""What happened to a run, with its times: `events.jsonl`, an object a line. The run's driver alone writes it."""

from typing import NotRequired

from pydantic import with_config
from typing_extensions import TypedDict

from threestage.data import storage
from threestage.errors import InputError
from threestage.run_folder.records import OTHERS_TOO

EVENTS_NAME = "events.jsonl"
MOST_BYTES = 2**24
ENDS = ("finished", "failed", "stopped")
"""Kinds of the last event of a driver."""


@with_config(OTHERS_TOO)
class Event(TypedDict):
    """`kind`: started, stage, warning, lost or one of ENDS. `seconds`, `devices`: for how long a driver has held so many."""

    time: str
    kind: str
    text: str
    seconds: NotRequired[float]
    devices: NotRequired[float]


def read_events(out: str) -> list[Event]:
    """The events of a run, the oldest first; lines that are damaged are left out."""
    uri = storage.join(out, EVENTS_NAME)
    if not storage.exists(uri):
        return []
    events = []
    for line in storage.read_small(uri, MOST_BYTES).decode(errors="replace").splitlines():
        try:
            events.append(storage.shaped(storage.parse_json(line, uri), Event, uri))
        except InputError:
            continue
    return events
