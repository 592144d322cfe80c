"""Randomness that can be replayed: every draw is a function of where it happens, so a checkpoint needs no random state."""

import hashlib


def derive_seed(*place: int | str) -> int:
    """A 63-bit seed for a place such as (seed, "stage2", step, rank); the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
