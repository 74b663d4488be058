"""Compare two sets of records row by row: a ratio of speeds, its interval, and a verdict that the interval
bears out.

Speed is 1 / median wall time for every workload, so that a ratio above 1 is faster, for ttft and load too. Only what
was measured alike is compared: numbers of one kind, on one target and processor, in one engine, with one workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cfsp.errors import InputError
from runtime_bench.records.record import EMULATED, BenchRecord
from runtime_bench.records.summary import ratio_interval

MIN_SAMPLES = 5
"""Fewest samples of each side, from as many processes, for a verdict: the range of five covers the median with
probability 1 - 2/2^5 = 0.94."""

THRESHOLD = 0.03
"""Relative change that counts as a difference."""

VERDICTS = ("faster", "slower", "no difference", "inconclusive")

_COMPARABLE = (
    "kind",
    "target",
    "engine",
    "workload",
    "n_prompt",
    "n_gen",
    "n_depth",
    "n_threads",
    "n_batch",
    "n_ubatch",
    "warmup",
    "page_cache",
    "memory_limit_bytes",
)
"""Two rows that differ in one of these measure different things."""

_Row = tuple[str, str, str, str, int]
"""Kind, target, engine, test, threads."""


@dataclass(frozen=True)
class Comparison:
    """One row of a comparison.

    Attributes:
        kind: How the numbers of both sides came about.
        target: Where both ran.
        engine: What both ran in.
        test: The workload, e.g. tg128.
        n_threads: Threads of both sides.
        base: File of the base.
        new: File held against it.
        base_median_ns: Median time of the base; None where it has no samples.
        new_median_ns: Median time of the new file.
        ratio: Speed of new / speed of base; None where a side has no samples. Above 1 is faster.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Of the interval.
        threshold: Relative change that counts as a difference.
        paired: Whether rounds of one interleaved session were compared pair by pair.
        basis: What the ratio is of: `wall`, or `cpu` where other programs held a single thread up.
        verdict: One of VERDICTS.
        reason: Why the verdict is inconclusive; None for the others.
        peak_rss_ratio: Peak memory of new / base.
        file_size_ratio: File size of new / base.
    """

    kind: str
    target: str
    engine: str
    test: str
    n_threads: int
    base: str
    new: str
    base_median_ns: float | None
    new_median_ns: float | None
    ratio: float | None
    low: float | None
    high: float | None
    confidence: float
    threshold: float
    paired: bool
    basis: str
    verdict: str
    reason: str | None
    peak_rss_ratio: float | None
    file_size_ratio: float | None


def compare(
    base: Sequence[BenchRecord],
    new: Sequence[BenchRecord],
    *,
    threshold: float = THRESHOLD,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """Compare row by row, in the order of `base`.

    Args:
        base: One record for each workload and thread count.
        new: Records of the same workloads and thread counts.
        threshold: Relative change that counts as a difference.
        confidence: Of the intervals.
        seed: Of the bootstrap.

    Raises:
        InputError: A row without partner or with several, or rows that measure different things.
    """
    left, right = _by_row(base, "base"), _by_row(new, "new")
    if not left or not right:
        raise InputError("nothing to compare: no records of the base or of the new file")
    _check_partners(left, right)
    return [
        compare_records(record, right[key], threshold=threshold, confidence=confidence, seed=seed)
        for key, record in left.items()
    ]


def by_model(records: Sequence[BenchRecord]) -> dict[str, list[BenchRecord]]:
    """Records of each file, by the file as it was named, in order of appearance."""
    models: dict[str, list[BenchRecord]] = {}
    for record in records:
        models.setdefault(record.model_filename, []).append(record)
    return models


def compare_records(
    base: BenchRecord,
    new: BenchRecord,
    *,
    threshold: float = THRESHOLD,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compare two records of the same workload.

    The verdict is `faster` or `slower` when the whole interval lies beyond the threshold, `no difference`
    when it lies within it on both sides, and otherwise `inconclusive`, as it is when a side failed or has
    fewer than MIN_SAMPLES.

    Raises:
        InputError: The records measure different things, or a setting is out of range.
    """
    _check_settings(threshold, confidence)
    _check_comparable(base, new)
    paired = base.session == new.session and base.rounds == new.rounds
    basis = _basis(base, new)
    sides = [record.cpu_samples_ns if basis == "cpu" else record.samples_ns for record in (base, new)]
    interval = (
        ratio_interval(
            *sides,
            paired=paired,
            numerator_rounds=base.rounds,
            denominator_rounds=new.rounds,
            confidence=confidence,
            seed=seed,
        )
        if all(sides) and base.kind != EMULATED
        else None
    )
    reason = _reason(base, new)
    verdict = (
        "inconclusive" if reason or interval is None else _verdict(interval.low, interval.high, threshold)
    )
    if verdict == "inconclusive" and reason is None:
        reason = "the interval crosses the threshold"
    return Comparison(
        kind=base.kind,
        target=base.target,
        engine=base.engine,
        test=base.test,
        n_threads=base.n_threads,
        base=base.model_filename,
        new=new.model_filename,
        base_median_ns=base.median_ns,
        new_median_ns=new.median_ns,
        ratio=interval.ratio if interval else None,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        confidence=confidence,
        threshold=threshold,
        paired=paired,
        basis=basis,
        verdict=verdict,
        reason=reason,
        peak_rss_ratio=_ratio(new.peak_rss_bytes, base.peak_rss_bytes),
        file_size_ratio=_ratio(new.file_size_bytes, base.file_size_bytes),
    )


def _basis(base: BenchRecord, new: BenchRecord) -> str:
    """Processor time where other programs held up one of two single threads: the clock on the wall then tells more of
    them than of the file."""
    complete = all(len(record.cpu_samples_ns) == len(record.samples_ns) > 0 for record in (base, new))
    return "cpu" if complete and (base.crowded or new.crowded) else "wall"


def _verdict(low: float, high: float, threshold: float) -> str:
    up, down = 1 + threshold, 1 / (1 + threshold)
    if low > up:
        return "faster"
    if high < down:
        return "slower"
    return "no difference" if low >= down and high <= up else "inconclusive"


def _reason(base: BenchRecord, new: BenchRecord) -> str | None:
    for side, record in (("base", base), ("new", new)):
        if not record.ok:
            return f"{side} failed: {record.failure}"
        if record.kind == EMULATED:
            return "emulated times say nothing"
        if record.void:
            return f"{side} writes degenerate text ({record.degenerate}), its speed is void"
        if len(set(record.rounds)) < MIN_SAMPLES:
            independent = "samples" if record.samples_per_process == 1 else "processes"
            return f"{side} has {len(set(record.rounds))} {independent}, a verdict needs {MIN_SAMPLES}"
    if base.workload == "load":
        for side, record in (("base", base), ("new", new)):
            wish, found = record.page_cache, record.page_cache_state
            if wish in ("warm", "cold") and found not in (wish, "unknown"):
                return f"{side} was to be loaded {wish}, and was {found}"
        if base.page_cache_state != new.page_cache_state:
            return f"base was loaded {base.page_cache_state}, new {new.page_cache_state}"
    return None


def _ratio(new: int | None, base: int | None) -> float | None:
    return new / base if new and base else None


def _check_settings(threshold: float, confidence: float) -> None:
    if not 0 <= threshold < 1:
        raise InputError("out of range", field="threshold", value=threshold, allowed="0 <= threshold < 1")
    if not 0.5 <= confidence < 1:
        raise InputError(
            "out of range", field="confidence", value=confidence, allowed="0.5 <= confidence < 1"
        )


def _check_comparable(base: BenchRecord, new: BenchRecord) -> None:
    names = [name for name in _COMPARABLE if getattr(base, name) != getattr(new, name)]
    if base.cpu_info and new.cpu_info and base.cpu_info != new.cpu_info:
        names.append("cpu_info")
    different = [f"{name} {getattr(base, name)!r} and {getattr(new, name)!r}" for name in names]
    if different:
        raise InputError(
            f"{base.test} and {new.test} measure different things and are never compared: {', '.join(different)}"
        )


def _check_partners(left: dict[_Row, BenchRecord], right: dict[_Row, BenchRecord]) -> None:
    """Refuse rows that one side has alone; where the other has the same test, say what keeps them apart."""
    for key, record in left.items():
        near = [other for row, other in right.items() if row[3:] == key[3:]]
        if key not in right and near:
            _check_comparable(record, near[0])
    alone = [_row_name(key) for key in [*left, *right] if (key in left) != (key in right)]
    if alone:
        raise InputError(
            f"rows without partner: {', '.join(alone)}",
            allowed="the same workloads, threads, targets and engines on both sides",
        )


def _by_row(records: Sequence[BenchRecord], side: str) -> dict[_Row, BenchRecord]:
    rows: dict[_Row, BenchRecord] = {}
    for record in records:
        key = (record.kind, record.target, record.engine, record.test, record.n_threads)
        if key in rows:
            raise InputError(
                f"{side} has several rows {_row_name(key)}", allowed="one model and one session at a time"
            )
        rows[key] = record
    return rows


def _row_name(row: _Row) -> str:
    kind, target, engine, test, threads = row
    return f"{test} with {threads} thread{'s' if threads > 1 else ''} ({kind}, {target}, {engine})"
