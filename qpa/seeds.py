"""Every random number of qpa is drawn from a seed that is split by the name of its use."""

from __future__ import annotations

import hashlib


def split_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed for one named use of a seed: the first bits of SHA-256("seed:name")."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
