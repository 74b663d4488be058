"""Compare two sets of records row by row: a ratio of speeds, its interval, and a verdict that the interval
bears out.

Speed is 1 / median wall time for every workload, so that a ratio above 1 is faster, for ttft and load too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cfsp.errors import InputError
from runtime_bench.record import BenchRecord
from runtime_bench.summary import ratio_interval

__all__ = ["MIN_SAMPLES", "VERDICTS", "Comparison", "compare", "compare_records"]

MIN_SAMPLES = 5
"""Fewest samples of each side for a verdict: the range of five covers the median with probability 1 - 2/2^5 =
0.94."""

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
)
"""Two rows that differ in one of these measure different things."""


@dataclass(frozen=True)
class Comparison:
    """One row of a comparison.

    Attributes:
        test: The workload, e.g. tg128.
        n_threads: Threads of both sides.
        base: File of the base.
        new: File held against it.
        ratio: Speed of new / speed of base; None where a side has no samples. Above 1 is faster.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Of the interval.
        threshold: Relative change that counts as a difference.
        paired: Whether rounds of one interleaved session were compared pair by pair.
        verdict: One of VERDICTS.
        reason: Why the verdict is inconclusive; None for the others.
        peak_rss_ratio: Peak memory of new / base.
        file_size_ratio: File size of new / base.
    """

    test: str
    n_threads: int
    base: str
    new: str
    ratio: float | None
    low: float | None
    high: float | None
    confidence: float
    threshold: float
    paired: bool
    verdict: str
    reason: str | None
    peak_rss_ratio: float | None
    file_size_ratio: float | None


def compare(
    base: Sequence[BenchRecord],
    new: Sequence[BenchRecord],
    *,
    threshold: float = 0.03,
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
    alone = [_row_name(key) for key in [*left, *right] if (key in left) != (key in right)]
    if alone:
        raise InputError(
            f"rows without partner: {', '.join(alone)}",
            allowed="the same workloads and threads on both sides",
        )
    return [
        compare_records(record, right[key], threshold=threshold, confidence=confidence, seed=seed)
        for key, record in left.items()
    ]


def compare_records(
    base: BenchRecord,
    new: BenchRecord,
    *,
    threshold: float = 0.03,
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
    paired = base.session == new.session and len(base.samples_ns) == len(new.samples_ns)
    measured = bool(base.samples_ns and new.samples_ns)
    interval = (
        ratio_interval(base.samples_ns, new.samples_ns, paired=paired, confidence=confidence, seed=seed)
        if measured
        else None
    )
    reason = _reason(base, new)
    verdict = (
        "inconclusive" if reason or interval is None else _verdict(interval.low, interval.high, threshold)
    )
    if verdict == "inconclusive" and reason is None:
        reason = "the interval crosses the threshold"
    return Comparison(
        test=base.test,
        n_threads=base.n_threads,
        base=base.model_filename,
        new=new.model_filename,
        ratio=interval.ratio if interval else None,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        confidence=confidence,
        threshold=threshold,
        paired=paired,
        verdict=verdict,
        reason=reason,
        peak_rss_ratio=_ratio(new.peak_rss_bytes, base.peak_rss_bytes),
        file_size_ratio=_ratio(new.file_size_bytes, base.file_size_bytes),
    )


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
        if len(record.samples_ns) < MIN_SAMPLES:
            return f"{side} has {len(record.samples_ns)} samples, a verdict needs {MIN_SAMPLES}"
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
    different = [
        f"{name} {getattr(base, name)!r} and {getattr(new, name)!r}"
        for name in _COMPARABLE
        if getattr(base, name) != getattr(new, name)
    ]
    if different:
        raise InputError(f"{base.test} and {new.test} measure different things: {', '.join(different)}")


def _by_row(records: Sequence[BenchRecord], side: str) -> dict[tuple[str, int], BenchRecord]:
    rows: dict[tuple[str, int], BenchRecord] = {}
    for record in records:
        key = (record.test, record.n_threads)
        if key in rows:
            raise InputError(f"{side} has several rows {_row_name(key)}; compare one file at a time")
        rows[key] = record
    return rows


def _row_name(key: tuple[str, int]) -> str:
    return f"{key[0]} with {key[1]} thread{'s' if key[1] > 1 else ''}"
