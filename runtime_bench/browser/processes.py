"""What the renderers below this process use: a page's memory is that of the renderer that it runs in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from runtime_bench.memory import peak_rss_bytes


def renderer_rss_bytes() -> int | None:
    """Resident memory of the largest renderer now; None where there is none."""
    return max((int(process.memory_info().rss) for process in _renderers()), default=None)


def renderer_peak_bytes() -> int | None:
    """The most resident memory that a living renderer has had; None where the system does not say (only Linux does)."""
    return max(filter(None, (peak_rss_bytes(process.pid) for process in _renderers())), default=None)


def _renderers() -> Iterator[Any]:
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("--type=renderer" in part for part in process.cmdline()):
                yield process
