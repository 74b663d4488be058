"""What stores take: the limits that a model's size has to keep to, each with who says so."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class StoreLimit:
    """A limit of a store.

    Attributes:
        bytes: The most.
        what: Of what.
        source: Who says so.
        date: When it was looked up.
    """

    bytes: int
    what: str
    source: str
    date: datetime.date


_GB = 10**9
_PLAY = "https://support.google.com/googleplay/android-developer/answer/9859372"
_APPLE = "https://developer.apple.com/help/app-store-connect/reference"
_LOOKED_UP = datetime.date(2026, 11, 28)

PLAY_PACK = "play-asset-pack"
STORES: Mapping[str, StoreLimit] = MappingProxyType(
    {
        PLAY_PACK: StoreLimit(
            1_500_000_000, "one asset pack or AI pack, download size, compressed", _PLAY, _LOOKED_UP
        ),
        "play-app": StoreLimit(
            4 * _GB, "all modules and install-time packs, download size, compressed", _PLAY, _LOOKED_UP
        ),
        "app-store-app": StoreLimit(
            4 * _GB, "the app, uncompressed", f"{_APPLE}/maximum-build-file-sizes", _LOOKED_UP
        ),
        "background-asset": StoreLimit(
            200 * _GB,
            "all Apple-hosted asset packs of an app together",
            f"{_APPLE}/apple-hosted-asset-pack-size-limits",
            _LOOKED_UP,
        ),
    }
)
"""Name in a budget -> the limit. Stores count a GB as they please; the smaller one, 10^9 bytes, is kept to."""
