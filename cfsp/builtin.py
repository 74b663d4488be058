"""Built-in models and the folder where fetched and computed things are kept."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """Folder for what can be fetched or computed again.

    PHONEREADY_CACHE where it is set, else XDG_CACHE_HOME/phoneready, else ~/.cache/phoneready.
    It may not exist yet.
    """
    own = os.environ.get("PHONEREADY_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "phoneready"
