"""RAPL: counters of the processor, of Intel's and AMD's, as Linux's powercap shows them.

Reads need root since Linux 5.10 (CVE-2020-8694), unless an administrator lets others read `energy_uj`. `package` is
all of a socket, `core` and `uncore` are parts of it, `dram` is the memory's, and `psys` what the maker of the
board has wired to it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from runtime_bench.conditions.meters.meter import Counter, Facts, Meter, Source, Track, counting, together

_ZONE = re.compile(r"/sys/class/powercap/(intel-rapl:[\d:]+)/energy_uj", re.ASCII)
_MICROJOULE = 1e-6
_MOST_W = 2000.0
"""Of one zone."""
_ORDER = ("package", "psys", "dram", "core", "uncore")


def _meters(facts: Facts, tracks: Mapping[str, Track]) -> Sequence[Meter]:
    domains: dict[str, list[Meter]] = {}
    for path, track in tracks.items():
        if _ZONE.fullmatch(path):
            folder = path.rpartition("/")[0]
            domain = re.sub(r"-\d+$", "", facts.get(f"{folder}/name", "").strip()) or "unnamed"
            counter = Counter(_MICROJOULE, _MOST_W, _range(facts.get(f"{folder}/max_energy_range_uj", "")))
            domains.setdefault(domain, []).append(counting("RAPL counter", domain, track, counter))
    known = [name for name in _ORDER if name in domains]
    return [together(domains[name]) for name in (*known, *sorted(domains.keys() - set(known)))]


def _range(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,18}", text.strip(), re.ASCII) and int(text) else None


RAPL = Source(
    "RAPL",
    'meter "$base"/sys/class/powercap/intel-rapl:*/energy_uj',
    _meters,
    ("/sys/class/powercap/intel-rapl:*/name", "/sys/class/powercap/intel-rapl:*/max_energy_range_uj"),
)
