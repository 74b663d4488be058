"""What the machine says about itself. Every figure that it does not give is None."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from cfsp.records import tool_version
from runtime_bench.record import Environment
from runtime_bench.workload import default_threads

__all__ = ["cpu_model", "describe_environment"]


def cpu_model() -> str | None:
    """Marketing name of the processor."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model") and value.strip():
            return value.strip()
    return platform.processor() or None


def describe_environment() -> Environment:
    """The machine as it is now, before any engine has added its versions."""
    import psutil

    return Environment(
        cpu_model=cpu_model(),
        cpus_usable=default_threads(),
        governor=_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip() or None,
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        memory_bytes=int(psutil.virtual_memory().total),
        platform=platform.platform(),
        versions={"phoneready": tool_version(), "python": platform.python_version()},
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
