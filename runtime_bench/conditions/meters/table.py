"""The kinds of meters, the one that says most of a run first."""

from __future__ import annotations

from types import MappingProxyType

from runtime_bench.conditions.meters.hwmon import HWMON
from runtime_bench.conditions.meters.meter import Source
from runtime_bench.conditions.meters.rapl import RAPL
from runtime_bench.conditions.meters.service import SERVICE
from runtime_bench.conditions.meters.supply import SUPPLY

SOURCES: MappingProxyType[str, Source] = MappingProxyType(
    {source.name: source for source in (RAPL, HWMON, SUPPLY, SERVICE)}
)
"""Name -> source; docs/benchmarking.md explains them."""
