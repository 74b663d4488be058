"""Compare two sets of records row by row: a ratio of speeds, its interval, and a verdict that the interval
bears out.

Speed is 1 / median time for every workload, so that a ratio above 1 is faster, for ttft and load too. Only what was
measured alike is compared: numbers of one kind, on one target and processor, in one engine, with one workload. What was
not is an `Incomparable`, and no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cfsp.errors import InputError
from cfsp.settings import SEED, Settings, check_settings, setting
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.energy import EnergyRatio, energy_ratio
from runtime_bench.records.judgement import judge, samples_of
from runtime_bench.records.summary import CONFIDENCE, RatioInterval

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
    """One row of a comparison."""

    kind: str  # How the numbers of both sides came about
    target: str  # Where both ran
    engine: str  # What both ran in
    test: str  # The workload, e.g. tg128.
    n_threads: int  # Threads of both sides
    quantized_cache: str | None  # Type of both sides' key-value cache where it has few bits
    base: str  # File of the base
    new: str  # File held against it
    base_median_ns: float | None  # Median time of the base, by the basis; None where it has no samples
    new_median_ns: float | None  # Median time of the new file
    base_median_ts: float | None  # Tokens per second at that time; None where the workload is no rate
    new_median_ts: float | None  # The same of the new file
    # Speed of new / speed of base, the quotient of the medians. Above 1 is faster; None where a side has no
    # samples, or they are too noisy for it to mean anything.
    ratio: float | None
    low: float | None  # Lower end of the interval
    high: float | None  # Upper end of the interval
    confidence: float  # Of the interval
    threshold: float  # Relative change that counts as a difference
    paired: bool  # Whether rounds of one interleaved session were compared pair by pair
    basis: str  # Whose time it is: `wall`, or `cpu` where other programs held a single thread up
    verdict: str  # One of VERDICTS
    reason: str | None  # Why the verdict is inconclusive or too noisy to tell; None for the others
    peak_rss_ratio: float | None  # Peak memory of new / base
    file_size_ratio: float | None  # File size of new / base
    # File that both sessions measured in turns with theirs; None where the two are compared themselves
    anchor: str | None = None
    # Speed of base / speed of the anchor in its session, where there is an anchor
    base_to_anchor: float | None = None
    # Speed of new / speed of the anchor in its session; `ratio` is the quotient of these two
    new_to_anchor: float | None = None
    # Joules a token of new / those of base, by one meter; None where energy was not asked for
    energy: EnergyRatio | None = None


@dataclass(frozen=True)
class Incomparable:
    """Two rows that are not compared, or one that has no partner."""

    test: str  # The workload, e.g. tg128.
    n_threads: int
    base: str | None  # File of the base; None where the new file alone has the row
    new: str | None  # File held against it; None where the base alone has the row
    reason: str  # What keeps them apart


Compared: TypeAlias = Comparison | Incomparable


def compare(
    base: Sequence[BenchRecord],
    new: Sequence[BenchRecord],
    settings: ComparisonSettings = DEFAULTS,
    anchors: Sequence[BenchRecord] = (),
) -> list[Compared]:
    """Compare row by row, in the order of `base`; rows that only `new` has come last.

    Sessions that had an anchor are compared by their ratios to it alone, wherever each was measured.

    Args:
        base: One record for each workload and thread count.
        new: Records of the same workloads and thread counts.
        settings: What counts; their seed is the bootstrap's.
        anchors: The anchors' own records, of all sessions.

    Raises:
        InputError: No records of a side, or several of one row.
    """
    apart = {r.session for r in base}.isdisjoint(r.session for r in new)
    anchored = apart and any(r.anchor_sha256 for r in (*base, *new))
    left, right = _by_row(base, "base", anchored=anchored), _by_row(new, "new", anchored=anchored)
    if not left or not right:
        raise InputError("nothing to compare: no records of the base or of the new file")
    rows: list[Compared] = []
    alone = {key: one for key, one in right.items() if key not in left}
    for key, one in left.items():
        # Where the other side has the same test, what keeps them apart is said.
        near = key if key in right else next((row for row in alone if row[-2:] == key[-2:]), None)
        if near is None:
            rows.append(_alone(key, one, "base"))
        else:
            alone.pop(near, None)
            rows.append(compare_records(one, right[near], settings, anchors))
    return rows + [_alone(key, one, "new") for key, one in alone.items()]


def _alone(key: _Row, record: BenchRecord, side: str) -> Incomparable:
    base, new = (record.model_filename, None) if side == "base" else (None, record.model_filename)
    return Incomparable(record.test, record.n_threads, base, new, f"row without partner: {_row_name(key)}")


def by_model(records: Sequence[BenchRecord]) -> dict[str, list[BenchRecord]]:
    """Records of each file, by the file as it was named, in order of appearance."""
    models: dict[str, list[BenchRecord]] = {}
    for record in records:
        models.setdefault(record.model_filename, []).append(record)
    return models


def _anchors_of(
    base: BenchRecord, new: BenchRecord, anchors: Sequence[BenchRecord]
) -> tuple[BenchRecord, BenchRecord] | str | None:
    """The anchor's rows of base's session and of new's, or why there are none; None where the two share a session, or
    neither session had an anchor."""
    if base.session == new.session or not (base.anchor_sha256 or new.anchor_sha256):
        return None
    if base.anchor_sha256 != new.anchor_sha256:
        names = [(one.anchor_sha256 or "none")[:12] for one in (base, new)]
        return f"the sessions had different anchors: {names[0]} and {names[1]}"
    rows = {_beside(record): record for record in anchors if record.is_anchor}
    found = rows.get(_beside(base)), rows.get(_beside(new))
    if found[0] is None or found[1] is None:
        return "the anchor's own row is not among the records"
    return found[0], found[1]


def _beside(record: BenchRecord) -> tuple[str, ...]:
    return record.session, record.kind, record.target, record.test, str(record.n_threads)


def compare_records(
    base: BenchRecord,
    new: BenchRecord,
    settings: ComparisonSettings = DEFAULTS,
    anchors: Sequence[BenchRecord] = (),
) -> Compared:
    """Compare two records.

    The verdict is `faster` or `slower` when the whole interval lies beyond the threshold, `no difference`
    when it lies within it on both sides, `too noisy to tell` when other programs or the differences between rounds hide
    what the files do, and otherwise `inconclusive`, as it is when a side failed or has fewer than MIN_SAMPLES.

    Raises:
        InputError: A setting is out of range.
    """
    check_settings(settings)
    beside = _anchors_of(base, new, anchors)
    anchored = beside if isinstance(beside, tuple) else None
    apart = beside if isinstance(beside, str) else _difference(base, new, anchored=anchored is not None)
    if apart is not None:
        return Incomparable(base.test, base.n_threads, base.model_filename, new.model_filename, apart)
    found = judge(
        samples_of(base, "base"),
        samples_of(new, "new"),
        (samples_of(anchored[0], "base's anchor"), samples_of(anchored[1], "new's anchor"))
        if anchored
        else None,
        confidence=settings.confidence,
        seed=settings.seed,
    )
    verdict, reason = INCONCLUSIVE if found.problem else TOO_NOISY, found.problem or found.noise
    if reason is None:
        verdict = _verdict(found.interval, settings.threshold)
        reason = "the interval crosses the threshold" if verdict == INCONCLUSIVE else None
    medians, shown = found.medians, found.shown
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
        confidence=found.confidence,
        threshold=settings.threshold,
        paired=found.paired,
        basis=found.basis,
        verdict=verdict,
        reason=reason,
        peak_rss_ratio=_quotient(new.peak_rss_bytes, base.peak_rss_bytes),
        file_size_ratio=_quotient(new.file_size_bytes, base.file_size_bytes),
        anchor=anchored[0].model_filename if anchored else None,
        base_to_anchor=_quotient(medians[2], medians[0]) if anchored else None,
        new_to_anchor=_quotient(medians[3], medians[1]) if anchored else None,
        energy=energy_ratio(base, new),
    )


def _quotient(dividend: float | None, divisor: float | None) -> float | None:
    return dividend / divisor if dividend and divisor else None


def _verdict(interval: RatioInterval | None, threshold: float) -> str:
    up, down = 1 + threshold, 1 / (1 + threshold)
    if interval is None:
        return INCONCLUSIVE
    if interval.low > up:
        return "faster"
    if interval.high < down:
        return "slower"
    return "no difference" if interval.low >= down and interval.high <= up else INCONCLUSIVE


def _difference(base: BenchRecord, new: BenchRecord, *, anchored: bool) -> str | None:
    """What the rows measured otherwise; None where they are comparable. An anchor stands for target and processor."""
    names = [name for name in _COMPARABLE if getattr(base, name) != getattr(new, name)]
    sides = {name: (getattr(base, name), getattr(new, name)) for name in ("cpu_info", "backends")}
    names += [name for name, (left, right) in sides.items() if left and right and left != right]
    different = [
        f"{name} {getattr(base, name)!r} and {getattr(new, name)!r}"
        for name in names
        if not (anchored and name in ("target", "cpu_info"))
    ]
    return f"they measure different things: {', '.join(different)}" if different else None


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


def against_the_first(records: Sequence[BenchRecord]) -> list[Compared]:
    """Every file against the first one of its engine on its target; anchors are left out."""
    rows: list[Compared] = []
    models = [record for record in records if not record.is_anchor]
    for place in dict.fromkeys((one.target, one.engine) for one in models):
        base, *others = by_model([r for r in models if (r.target, r.engine) == place]).values()
        rows += [row for other in others for row in compare(base, other)]
    return rows
