"""Benchmark records by where and how they came about: what may be compared with what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime_bench.records.bench_record import KINDS, BenchRecord, Environment
from runtime_bench.records.fairness import has_speed

_RATES = ("tg", "pp", "ttft")
"""Workloads in the order in which they say most about a chat on a phone."""


@dataclass(frozen=True)
class BenchGroup:
    """Records of one kind from one target with one cache; only these are ever set side by side."""

    kind: str  # One of KINDS
    target: str
    quantized_cache: str | None
    records: tuple[BenchRecord, ...]  # In the order measured

    @property
    def environment(self) -> Environment:
        """The machine as its first record saw it."""
        return self.records[0].environment

    @property
    def title(self) -> str:
        """Kind and target, to begin a sentence."""
        cache = f" with a cache of {self.quantized_cache}" if self.quantized_cache else ""
        return f"{self.kind.capitalize()} on {self.target}{cache}"

    @property
    def tests(self) -> list[tuple[str, int]]:
        """Every workload and number of threads, in the order measured."""
        return list(dict.fromkeys((r.test, r.n_threads) for r in self.records))

    @property
    def files(self) -> list[str]:
        """The files, in the order measured."""
        return list(dict.fromkeys(r.model_filename for r in self.records))

    def find(self, file: str, test: str, threads: int) -> BenchRecord | None:
        """The last record of a file, a workload and a number of threads."""
        key = (file, test, threads)
        matching = [r for r in self.records if (r.model_filename, r.test, r.n_threads) == key]
        return matching[-1] if matching else None

    def pairs(self, dense: str, pruned: str) -> list[tuple[BenchRecord, BenchRecord]]:
        """Records of two files that measure the same."""
        keys = dict.fromkeys((r.test, r.n_threads) for r in self.records if r.model_filename == dense)
        pairs = [(self.find(dense, *key), self.find(pruned, *key)) for key in keys]
        return [(d, p) for d, p in pairs if d is not None and p is not None and d.engine == p.engine]

    def peak_rss_bytes(self, file: str) -> int | None:
        """Highest resident memory of any process of a file."""
        peaks = [r.peak_rss_bytes for r in self.records if r.model_filename == file and r.peak_rss_bytes]
        return max(peaks, default=None)

    def main_tests(self) -> list[tuple[str, int]]:
        """One workload of each sort, at the number of threads that is fastest for the first file."""
        measured = [r for r in self.records if r.model_filename == self.files[0] and r.ok and r.median_ns]
        first = [r for r in measured if has_speed(r)] or measured
        tests = []
        for workload in _RATES:
            rows = [r for r in first if r.workload == workload]
            if rows:
                alike = (r for r in rows if r.test == rows[-1].test)
                best = min(alike, key=lambda r: r.median_ns or 0.0)
                tests.append((best.test, best.n_threads))
        return tests


def bench_groups(records: Sequence[BenchRecord]) -> list[BenchGroup]:
    """Groups in the order of KINDS, measured ones first, then of their first record."""
    groups: dict[tuple[str, str, str | None], list[BenchRecord]] = {}
    for record in records:
        groups.setdefault((record.kind, record.target, record.quantized_cache), []).append(record)
    ordered = sorted(groups, key=lambda key: KINDS.index(key[0]))
    return [BenchGroup(*key, tuple(groups[key])) for key in ordered]
