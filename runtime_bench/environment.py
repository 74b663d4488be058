"""What a machine says about itself. Every figure that it does not give is None.

Linux, and so Android, says it in files; `environment_of` reads their text, wherever it was fetched from.
"""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cfsp.records import tool_version
from runtime_bench.records.bench_record import Environment
from runtime_bench.workload import default_threads

_CPUFREQ = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq"
FACT_FILES = (
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/loadavg",
    f"{_CPUFREQ}/scaling_governor",
)
"""Patterns of the files that `environment_of` reads; the machine decides which are there and may be read."""


def cpu_model(cpuinfo: str | None = None) -> str | None:
    """Name of the processor: as it is sold, or on Arm the number of cores of each part."""
    text = read_fact("/proc/cpuinfo") if cpuinfo is None else cpuinfo
    pairs = [
        (key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in text.splitlines())
    ]
    first = {key: value for key, value in reversed(pairs) if value}
    name = first.get("model name") or first.get("Hardware") or first.get("Model")
    if name:
        return name
    return _arm_cores(pairs) or (platform.processor() or None if cpuinfo is None else None)


def _arm_cores(pairs: Iterable[tuple[str, str]]) -> str:
    makers = [value for key, value in pairs if key == "CPU implementer"]
    parts = Counter(zip(makers, (value for key, value in pairs if key == "CPU part"), strict=False))
    return ", ".join(f"{count} x {maker}/{part}" for (maker, part), count in parts.items())


def environment_of(
    files: Mapping[str, str],
    *,
    cpus_usable: int | None,
    platform: str,
    versions: Mapping[str, str],
    cpu_name: str | None = None,
) -> Environment:
    """The machine that some files were read on."""
    memory = re.search(r"^MemTotal:\s*(\d+) kB", files.get("/proc/meminfo", ""), re.MULTILINE)
    load = re.match(r"\d+(?:\.\d+)?", files.get("/proc/loadavg", ""))
    governors = list(_of_cores(files, "scaling_governor"))
    return Environment(
        cpu_model=cpu_name or cpu_model(files.get("/proc/cpuinfo", "")),
        cpus_usable=cpus_usable,
        governor=governors[0] if governors else None,
        load_average=float(load[0]) if load else None,
        memory_bytes=int(memory[1]) * 1024 if memory else None,
        platform=platform,
        versions=dict(versions),
    )


def describe_environment() -> Environment:
    """This machine as it is now, before any engine has added its versions."""
    import psutil

    environment = environment_of(
        {str(path): read_fact(str(path)) for pattern in FACT_FILES for path in Path("/").glob(pattern[1:])},
        cpus_usable=default_threads(),
        platform=platform.platform(),
        versions={"phoneready": tool_version(), "python": platform.python_version()},
    )
    return replace(
        environment,
        cpu_model=cpu_model(),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        memory_bytes=int(psutil.virtual_memory().total),
    )


def _of_cores(files: Mapping[str, str], name: str) -> Iterator[str]:
    """A cpufreq file's text for each core that has it, in the order of the cores."""
    by_core = {}
    for path, text in files.items():
        match = re.fullmatch(rf"/sys/devices/system/cpu/cpu(\d+)/cpufreq/{name}", path)
        if match and text.strip():
            by_core[int(match[1])] = text.strip()
    return (by_core[core] for core in sorted(by_core))


def read_fact(path: str) -> str:
    """The text of a file with facts; empty where it is not there or may not be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
