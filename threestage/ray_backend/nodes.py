"""The cluster's nodes, of which Ray also lists those that are gone."""

from collections.abc import Callable, Sequence
from typing import Any

import ray

from threestage.data import storage


def alive_nodes() -> list[dict[str, Any]]:
    """What Ray says of each."""
    return [node for node in ray.nodes() if node["Alive"]]


def alive_ids() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in alive_nodes())


def warn_of_folders(places: Sequence[str], warn: Callable[[str], None]) -> None:
    """Of several nodes each has folders of its own: say which of the places must be shared."""
    here, nodes = [place for place in places if not storage.is_s3(place)], len(alive_nodes())
    if here and nodes > 1:
        warn(f"the cluster has {nodes} nodes, which must share {' and '.join(here)}, or give s3://bucket/prefix")
