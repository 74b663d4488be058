"""Compare two sets of records row by row: a ratio of speeds, its interval, and a verdict that the interval
bears out.

Speed is 1 / median time for every workload, so that a ratio above 1 is faster, for ttft and load too. The time is the
clock's, or the processor's where other programs held a single thread up; medians and ratio of a comparison are always
of the same one. Where the machine was so busy that neither tells of the files, there is no ratio. Only what was
measured alike is compared: numbers of one kind, on one target and processor, in one engine, with one workload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cfsp.errors import InputError
from cfsp.settings import SEED, Settings, check_settings, setting
from runtime_bench.records import summary
from runtime_bench.records.bench_record import EMULATED, BenchRecord
from runtime_bench.records.crowding import judged_by_processor_time
from runtime_bench.records.energy_comparison import EnergyRatio, energy_ratio
from runtime_bench.records.fairness import capped_apart, noise
from runtime_bench.records.summary import CONFIDENCE, RatioInterval, quotient_interval, ratio_interval

MIN_SAMPLES = 5
"""Fewest samples of each side, from as many processes, for a verdict: the range of five covers the median with
probability 1 - 2/2^5 = 0.94."""

WIDEST = 1.5
"""Upper end / lower end of an interval beyond which its ratio says nothing."""

INCONCLUSIVE, TOO_NOISY = "inconclusive", "too noisy to tell"
VERDICTS = ("faster", "slower", "no difference", INCONCLUSIVE, TOO_NOISY)

_COMPARABLE = (
    "kind",
    "target",
    "engine",
    "workload",
    "n_prompt",
    "n_gen",
    "n_depth",
    "regime",
    "sustained_s",
    "n_threads",
    "n_batch",
    "n_ubatch",
    "warmup",
    "page_cache",
    "memory_limit_bytes",
    "quantized_cache",
)
"""Two rows that differ in one of these measure different things."""

_Row = tuple[str, str, str, str | None, str, int]
"""Kind, target (none where anchors stand for it), engine, type of a quantized cache, test, threads."""


@dataclass(frozen=True)
class ComparisonSettings(Settings):
    """What counts as a difference, and how sure its interval is."""

    threshold: float = setting(0.03, "Relative change that counts as a difference.", ge=0, lt=1)
    confidence: float = setting(CONFIDENCE, "Confidence of the interval.", ge=0.5, lt=1)
    seed: int = setting(0, SEED)


DEFAULTS = ComparisonSettings()


@dataclass(frozen=True)
class Comparison:
    """One row of a comparison.

    Attributes:
        kind: How the numbers of both sides came about.
        target: Where both ran.
        engine: What both ran in.
        test: The workload, e.g. tg128.
        n_threads: Threads of both sides.
        quantized_cache: Type of both sides' key-value cache where it has few bits.
        base: File of the base.
        new: File held against it.
        base_median_ns: Median time of the base, by the basis; None where it has no samples.
        new_median_ns: Median time of the new file.
        base_median_ts: Tokens per second at that time; None where the workload is no rate.
        new_median_ts: The same of the new file.
        ratio: Speed of new / speed of base, the quotient of the medians. Above 1 is faster; None where a side has no
            samples, or they are too noisy for it to mean anything.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Of the interval.
        threshold: Relative change that counts as a difference.
        paired: Whether rounds of one interleaved session were compared pair by pair.
        basis: Whose time it is: `wall`, or `cpu` where other programs held a single thread up.
        verdict: One of VERDICTS.
        reason: Why the verdict is inconclusive or too noisy to tell; None for the others.
        peak_rss_ratio: Peak memory of new / base.
        file_size_ratio: File size of new / base.
        anchor: File that both sessions measured in turns with theirs; None where the two are compared themselves.
        base_to_anchor: Speed of base / speed of the anchor in its session, where there is an anchor.
        new_to_anchor: Speed of new / speed of the anchor in its session; `ratio` is the quotient of these two.
        energy: Joules a token of new / those of base, by one meter; None where energy was not asked for.
    """

    kind: str
    target: str
    engine: str
    test: str
    n_threads: int
    quantized_cache: str | None
    base: str
    new: str
    base_median_ns: float | None
    new_median_ns: float | None
    base_median_ts: float | None
    new_median_ts: float | None
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
    anchor: str | None = None
    base_to_anchor: float | None = None
    new_to_anchor: float | None = None
    energy: EnergyRatio | None = None


Anchors = tuple[BenchRecord, BenchRecord]
"""The anchor's rows of base's session and of new's."""


def compare(
    base: Sequence[BenchRecord],
    new: Sequence[BenchRecord],
    settings: ComparisonSettings = DEFAULTS,
    anchors: Sequence[BenchRecord] = (),
) -> list[Comparison]:
    """Compare row by row, in the order of `base`.

    Sessions that had an anchor are compared by their ratios to it alone, wherever each was measured.

    Args:
        base: One record for each workload and thread count.
        new: Records of the same workloads and thread counts.
        settings: What counts; their seed is the bootstrap's.
        anchors: The anchors' own records, of all sessions.

    Raises:
        InputError: A row without partner or with several, rows that measure different things, or sessions of different
            anchors.
    """
    apart = {r.session for r in base}.isdisjoint(r.session for r in new)
    anchored = apart and any(r.anchor_sha256 for r in (*base, *new))
    left, right = _by_row(base, "base", anchored=anchored), _by_row(new, "new", anchored=anchored)
    if not left or not right:
        raise InputError("nothing to compare: no records of the base or of the new file")
    _check_partners(left, right)
    return [
        compare_records(one, right[key], settings, _anchors_of(one, right[key], anchors))
        for key, one in left.items()
    ]


def by_model(records: Sequence[BenchRecord]) -> dict[str, list[BenchRecord]]:
    """Records of each file, by the file as it was named, in order of appearance."""
    models: dict[str, list[BenchRecord]] = {}
    for record in records:
        models.setdefault(record.model_filename, []).append(record)
    return models


def _anchors_of(base: BenchRecord, new: BenchRecord, anchors: Sequence[BenchRecord]) -> Anchors | None:
    """The anchor's rows beside two records; None where they share a session, or neither session had an anchor."""
    if base.session == new.session or not (base.anchor_sha256 or new.anchor_sha256):
        return None
    if base.anchor_sha256 != new.anchor_sha256:
        names = [one.anchor_sha256 or "none" for one in (base, new)]
        raise InputError(
            f"{base.test}: the sessions had different anchors: {names[0][:12]} and {names[1][:12]}",
            allowed="sessions with one anchor, which alone says how the machines compare",
        )
    found = [
        next((r for r in anchors if r.is_anchor and _beside(r) == _beside(one)), None) for one in (base, new)
    ]
    if found[0] is None or found[1] is None:
        raise InputError(f"{base.test}: the anchor's own row is not among the records")
    return found[0], found[1]


def _beside(record: BenchRecord) -> tuple[str, ...]:
    return record.session, record.kind, record.target, record.test, str(record.n_threads)


def compare_records(
    base: BenchRecord,
    new: BenchRecord,
    settings: ComparisonSettings = DEFAULTS,
    anchors: Anchors | None = None,
) -> Comparison:
    """Compare two records of the same workload.

    The verdict is `faster` or `slower` when the whole interval lies beyond the threshold, `no difference`
    when it lies within it on both sides, `too noisy to tell` when other programs or the differences between rounds hide
    what the files do, and otherwise `inconclusive`, as it is when a side failed or has fewer than MIN_SAMPLES.

    With `anchors`, the speeds that are compared are those in multiples of the anchor's in the same session.

    Raises:
        InputError: The records measure different things, or a setting is out of range.
    """
    check_settings(settings)
    _check_comparable(base, new, anchored=anchors is not None)
    sides = dict(zip(_SIDES, (base, new, *(anchors or ())), strict=False))
    basis = "cpu" if judged_by_processor_time(sides.values()) else "wall"
    paired = base.session == new.session and base.rounds == new.rounds
    times = [one.cpu_samples_ns if basis == "cpu" else one.samples_ns for one in sides.values()]
    medians = [summary.median(samples) for samples in times]
    interval = None
    if all(times) and base.kind != EMULATED:
        interval = _interval(times, [one.rounds for one in sides.values()], settings, paired=paired)
    noisy = _noise(sides, basis, interval)
    verdict, reason = _outcome(_reason(sides), noisy, interval, settings.threshold)
    shown = None if noisy else interval
    return Comparison(
        kind=base.kind,
        target=", ".join(dict.fromkeys((base.target, new.target))),
        engine=base.engine,
        test=base.test,
        n_threads=base.n_threads,
        quantized_cache=base.quantized_cache,
        base=base.model_filename,
        new=new.model_filename,
        base_median_ns=medians[0],
        new_median_ns=medians[1],
        base_median_ts=base.speed_at(medians[0]),
        new_median_ts=new.speed_at(medians[1]),
        ratio=shown.ratio if shown else None,
        low=shown.low if shown else None,
        high=shown.high if shown else None,
        confidence=settings.confidence,
        threshold=settings.threshold,
        paired=paired,
        basis=basis,
        verdict=verdict,
        reason=reason,
        peak_rss_ratio=_ratio(new.peak_rss_bytes, base.peak_rss_bytes),
        file_size_ratio=_ratio(new.file_size_bytes, base.file_size_bytes),
        anchor=anchors[0].model_filename if anchors else None,
        base_to_anchor=_quotient(medians[2], medians[0]) if anchors else None,
        new_to_anchor=_quotient(medians[3], medians[1]) if anchors else None,
        energy=energy_ratio(base, new),
    )


_SIDES = ("base", "new", "base's anchor", "new's anchor")


def _interval(
    times: Sequence[Sequence[int]],
    rounds: Sequence[Sequence[int]],
    settings: ComparisonSettings,
    *,
    paired: bool,
) -> RatioInterval:
    """Of the speed of new over base; of four times that in multiples of the anchors'."""
    if len(times) == len(_SIDES):
        return quotient_interval(
            (times[3], times[1]),
            (rounds[3], rounds[1]),
            (times[2], times[0]),
            (rounds[2], rounds[0]),
            confidence=settings.confidence,
            seed=settings.seed,
        )
    return ratio_interval(
        *times,
        paired=paired,
        numerator_rounds=rounds[0],
        denominator_rounds=rounds[1],
        confidence=settings.confidence,
        seed=settings.seed,
    )


def _quotient(dividend: float | None, divisor: float | None) -> float | None:
    return dividend / divisor if dividend and divisor else None


def _outcome(
    reason: str | None, noisy: str | None, interval: RatioInterval | None, threshold: float
) -> tuple[str, str | None]:
    """Verdict and reason."""
    if reason or noisy:
        return (INCONCLUSIVE, reason) if reason else (TOO_NOISY, noisy)
    verdict = _verdict(interval, threshold)
    return verdict, "the interval crosses the threshold" if verdict == INCONCLUSIVE else None


def _noise(sides: Mapping[str, BenchRecord], basis: str, interval: RatioInterval | None) -> str | None:
    """Why the times say nothing of the files; None where they do."""
    for side, record in sides.items():
        why = noise(record, wall=basis == "wall")
        if why and record.ok:
            return f"{side}: {why}"
    base, new, *anchors = sides.values()
    beside = zip((base, new), anchors, strict=True) if anchors else [(base, new)]
    apart = next(filter(None, (capped_apart(*pair) for pair in beside)), None)
    if apart:
        return apart
    if interval and interval.high > WIDEST * interval.low:
        width = interval.high / interval.low
        return f"the rounds differ too much: one end of the interval is {width:.1f} times the other"
    return None


def _verdict(interval: RatioInterval | None, threshold: float) -> str:
    up, down = 1 + threshold, 1 / (1 + threshold)
    if interval is None:
        return INCONCLUSIVE
    if interval.low > up:
        return "faster"
    if interval.high < down:
        return "slower"
    return "no difference" if interval.low >= down and interval.high <= up else INCONCLUSIVE


def _reason(sides: Mapping[str, BenchRecord]) -> str | None:
    for side, record in sides.items():
        if not record.ok:
            return f"{side} failed: {record.failure}"
        if record.kind == EMULATED:
            return "emulated times say nothing"
        if record.void:
            return f"{side} writes degenerate text ({record.degenerate}), its speed is void"
        if len(set(record.rounds)) < MIN_SAMPLES:
            independent = "samples" if record.samples_per_process == 1 else "processes"
            return f"{side} has {len(set(record.rounds))} {independent}, a verdict needs {MIN_SAMPLES}"
    for side, record in sides.items():
        wish, state = record.page_cache, record.page_cache_state
        if wish in ("warm", "cold") and state not in (wish, "unknown"):
            return f"{side} was to be loaded {wish}, and was {state}"
    base, new, *_ = sides.values()
    if base.timed.opens and base.page_cache_state != new.page_cache_state:
        return f"base was loaded {base.page_cache_state}, new {new.page_cache_state}"
    return None


def _ratio(new: int | None, base: int | None) -> float | None:
    return new / base if new and base else None


def _check_comparable(base: BenchRecord, new: BenchRecord, *, anchored: bool = False) -> None:
    names = [name for name in _COMPARABLE if getattr(base, name) != getattr(new, name)]
    said = ("backends",) if anchored else ("cpu_info", "backends")
    if anchored:  # where they were measured is what the anchor stands for
        names = [name for name in names if name != "target"]
    sides = {name: (getattr(base, name), getattr(new, name)) for name in said}
    names += [name for name, (left, right) in sides.items() if left and right and left != right]
    different = [f"{name} {getattr(base, name)!r} and {getattr(new, name)!r}" for name in names]
    if different:
        raise InputError(
            f"{base.test} and {new.test} measure different things and are never compared: {', '.join(different)}"
        )


def _check_partners(left: dict[_Row, BenchRecord], right: dict[_Row, BenchRecord]) -> None:
    """Refuse rows that one side has alone; where the other has the same test, say what keeps them apart."""
    for key, record in left.items():
        near = [other for row, other in right.items() if row[-2:] == key[-2:]]
        if key not in right and near:
            _check_comparable(record, near[0])
    alone = [_row_name(key) for key in [*left, *right] if (key in left) != (key in right)]
    if alone:
        raise InputError(
            f"rows without partner: {', '.join(alone)}",
            allowed="the same workloads, threads, targets and engines on both sides",
        )


def _by_row(records: Sequence[BenchRecord], side: str, *, anchored: bool) -> dict[_Row, BenchRecord]:
    rows: dict[_Row, BenchRecord] = {}
    for record in records:
        place = (record.kind, "" if anchored else record.target, record.engine)
        key = (*place, record.quantized_cache, record.test, record.n_threads)
        if key in rows:
            raise InputError(
                f"{side} has several rows {_row_name(key)}", allowed="one model and one session at a time"
            )
        rows[key] = record
    return rows


def _row_name(row: _Row) -> str:
    *place, cache, test, threads = row
    where = ", ".join(filter(None, [*place, f"cache of {cache}" if cache else None]))
    return f"{test} with {threads} thread{'s' if threads > 1 else ''} ({where})"
