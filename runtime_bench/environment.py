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
    f"{_CPUFREQ}/scaling_max_freq",
    f"{_CPUFREQ}/cpuinfo_max_freq",
    "/sys/class/thermal/thermal_zone[0-9]*/type",
    "/sys/class/thermal/thermal_zone[0-9]*/temp",
)
"""Patterns of the files that `environment_of` reads; the machine decides which are there and may be read."""
_COLDEST_C, _HOTTEST_C = -40.0, 150.0
"""Zones that are not connected report values far outside."""


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
        core_max_khz=_clocks(files, "cpuinfo_max_freq"),
        core_cap_khz=_clocks(files, "scaling_max_freq"),
        temperatures_c=_temperatures(files),
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


def _clocks(files: Mapping[str, str], name: str) -> tuple[int, ...]:
    texts = list(_of_cores(files, name))
    return tuple(map(int, texts)) if all(text.isdecimal() for text in texts) else ()


def _temperatures(files: Mapping[str, str]) -> dict[str, float]:
    """Thermal zones by their kind; several of a kind keep the hottest."""
    hottest: dict[str, float] = {}
    for path, text in files.items():
        folder, _, name = path.rpartition("/")
        kind = files.get(f"{folder}/type", "").strip()
        if name != "temp" or not kind or not re.fullmatch(r"-?\d+", text.strip()):
            continue
        celsius = int(text) / 1000  # millidegrees, as the kernel documents
        if _COLDEST_C < celsius < _HOTTEST_C:
            hottest[kind] = max(celsius, hottest.get(kind, celsius))
    return hottest


def clock_cap(*looks: Environment) -> float | None:
    """Least share of its highest clock that any core was allowed in any look; None where no clocks are shown.

    A phone that is hot lowers the highest clock of its cores (`scaling_max_freq` below `cpuinfo_max_freq`), and says so
    before and after a run. The clock of the moment is no help: between two runs cores idle at their lowest. A machine
    that shows neither clocks nor zones, as most virtual machines, gives None.
    """
    shares = [
        cap / most
        for look in looks
        if len(look.core_cap_khz) == len(look.core_max_khz)
        for cap, most in zip(look.core_cap_khz, look.core_max_khz, strict=True)
    ]
    return min(shares, default=None)


def hottest_c(*looks: Environment) -> float | None:
    """Hottest thermal zone in any look; None without zones."""
    return max((zone for look in looks for zone in look.temperatures_c.values()), default=None)


def read_fact(path: str) -> str:
    """The text of a file with facts; empty where it is not there or may not be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
