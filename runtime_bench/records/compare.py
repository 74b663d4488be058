"""Group records that may be compared, judge two sets of samples, and compare two sets of records row by row.

Speed is 1 / median time for every workload: a ratio above 1 is faster, for ttft and load too. The time is the clock's,
or the processor's where other programs held a single thread up. If the machine was so busy that neither tells of the
files, there is no ratio. What was not measured alike is an `Incomparable`, and no error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from cfsp.errors import InputError
from cfsp.settings import SEED, Settings, check_settings, setting
from runtime_bench.records import summary
from runtime_bench.records.bench_record import EMULATED, KINDS, BenchRecord, Environment
from runtime_bench.records.fairness import (
    EnergyRatio,
    capped_apart,
    capped_at,
    energy_ratio,
    has_processor_time,
    has_speed,
)
from runtime_bench.records.fairness import noise as noise_of
from runtime_bench.records.pairs import Items, Windows, compare_items, compare_windows
from runtime_bench.records.summary import (
    CONFIDENCE,
    RESAMPLES,
    RatioInterval,
    quotient_interval,
    ratio_interval,
)

MIN_SAMPLES = 5
"""Fewest samples of each side, from as many processes, for a verdict: the range of n covers the median with
probability 1 - 2/2^n, of five with 0.94; `fewest` of a surer one."""

WIDEST = 1.5
"""Upper end / lower end of an interval beyond which its ratio says nothing."""


@dataclass(frozen=True)
class Samples:
    """The samples of one row, as they are judged."""

    name: str  # What reasons call it
    times: tuple[float, ...]  # Less is better; in the order taken
    rounds: tuple[int, ...] = ()  # For each, its process; if empty, each has one of its own
    cpu_times: tuple[float, ...] = ()  # The same by the processor's clock, if that tells of the file
    session: str | None = None  # Rows of one session took turns
    problem: str | None = None  # Why nothing is said of it, whatever its times
    noise: str | None = None  # Why its times tell more of the machine than of the file
    cpu_noise: str | None = None  # The same of `cpu_times`
    loaded: str | None = None  # State of the page cache, if the opening of the file is timed
    cap: float | None = None  # Share of the highest clock that it was held to (`capped_at`)
    looks: int = 1  # How often they may have been looked at to decide whether to take more

    @property
    def n_independent(self) -> int:
        """Independent samples: those of one process share what that process met."""
        return len(set(self.rounds)) if len(self.rounds) == len(self.times) else len(self.times)

    def too_few(self, confidence: float) -> str | None:
        """Why it has too few samples for a verdict of such a confidence, or None."""
        wanted = fewest(surer(confidence, self))  # more are asked only of what was measured on
        if self.n_independent >= wanted:
            return None
        independent = "samples" if self.n_independent == len(self.times) else "processes"
        return f"{self.name} has {self.n_independent} {independent}, a verdict needs {wanted}"


def fewest(confidence: float) -> int:
    """Fewest independent samples whose range covers the median about as surely."""
    return max(MIN_SAMPLES, math.ceil(1 - math.log2(1.25 * (1 - confidence)) - 1e-9))


def surer(confidence: float, *sides: Samples) -> float:
    """The confidence of each of several looks, so that together they err no more often than one (Bonferroni)."""
    looks = max(one.looks for one in sides)
    return confidence if looks == 1 else 1 - (1 - confidence) / looks


@dataclass(frozen=True)
class Judgement:
    """What two sets of samples say of each other."""

    confidence: float  # Of the interval
    basis: str  # Whose time it is: `wall`, or `cpu` if other programs held a single thread up
    paired: bool  # Whether rounds of one interleaved session were compared pair by pair
    medians: tuple[float | None, ...]  # Time of base and new, then of their anchors, by the basis
    interval: RatioInterval | None  # Speed of new / speed of base; with `noise` it means nothing
    problem: str | None  # Why there is no verdict, however steady the samples are
    noise: str | None  # Why the samples say nothing of the files

    @property
    def shown(self) -> RatioInterval | None:
        """The interval, if it means something."""
        return None if self.noise else self.interval


def samples_of(record: BenchRecord, name: str) -> Samples:
    """A row's samples; `name` is what reasons call it."""
    wish, state = record.page_cache, record.page_cache_state
    problems = (
        (not record.ok, f"{name} failed: {record.failure}"),
        (record.kind == EMULATED, "emulated times say nothing"),
        (record.void, f"{name} writes degenerate text ({record.degenerate}), its speed is void"),
        (
            wish in ("warm", "cold") and state not in (wish, "unknown"),
            f"{name} was to be loaded {wish}, and was {state}",
        ),
    )
    return Samples(
        name,
        () if record.kind == EMULATED else record.samples_ns,
        record.rounds,
        cpu_times=record.cpu_samples_ns if has_processor_time(record) else (),
        session=record.session,
        problem=next((why for holds, why in problems if holds), None),
        noise=noise_of(record) if record.ok else None,
        cpu_noise=noise_of(record, wall=False) if record.ok else None,
        loaded=record.page_cache_state if record.timed.opens else None,
        cap=capped_at(record),
        looks=record.measured_on.looks if record.measured_on else 1,
    )


def judge(
    base: Samples,
    new: Samples,
    anchors: tuple[Samples, Samples] | None = None,
    *,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Judgement:
    """How fast `new` is in multiples of `base`, and whether the samples can tell.

    With `anchors`, of base's session and of new's, speeds in multiples of theirs are compared.
    """
    asked, confidence = confidence, surer(confidence, base, new)
    sides = (base, new, *(anchors or ()))
    # What noise only the clock on the wall has, the processor's clock sees through.
    by_cpu = all(one.cpu_times for one in sides) and any(one.noise and not one.cpu_noise for one in sides)
    times = [one.cpu_times if by_cpu else one.times for one in sides]
    paired = base.session is not None and base.session == new.session and base.rounds == new.rounds
    interval, rounds = None, [one.rounds for one in sides]
    if all(times) and anchors:
        new_session, base_session = (((times[i + 2], times[i]), (rounds[i + 2], rounds[i])) for i in (1, 0))
        interval = quotient_interval(
            *new_session, *base_session, confidence=confidence, seed=seed, resamples=resamples
        )
    elif all(times):
        interval = ratio_interval(
            *times,
            paired=paired,
            numerator_rounds=rounds[0],
            denominator_rounds=rounds[1],
            confidence=confidence,
            seed=seed,
            resamples=resamples,
        )
    problem = next((why for one in sides if (why := one.problem or one.too_few(asked))), None)
    if problem is None and base.loaded != new.loaded:
        problem = f"{base.name} was loaded {base.loaded}, {new.name} {new.loaded}"
    noises = ((one.name, one.cpu_noise if by_cpu else one.noise) for one in sides)
    noise = next((f"{name}: {why}" for name, why in noises if why), None)
    pairs = zip((base, new), anchors, strict=True) if anchors else ((base, new),)
    noise = noise or next(filter(None, (capped_apart(*(one.cap for one in pair)) for pair in pairs)), None)
    if noise is None and interval and interval.high > WIDEST * interval.low:
        width = interval.high / interval.low
        noise = f"the rounds differ too much: one end of the interval is {width:.1f} times the other"
    return Judgement(
        confidence=confidence,
        basis="cpu" if by_cpu else "wall",
        paired=paired,
        medians=tuple(map(summary.median, times)),
        interval=interval,
        problem=problem,
        noise=noise,
    )


INCONCLUSIVE, TOO_NOISY = "inconclusive", "too noisy to tell"
BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference"
THRESHOLD = 0.03
"""Relative change that counts as a difference."""


def verdict_of(low: float, high: float, up: float, down: float) -> str:
    """What an interval says of something that is better the more it is.

    BETTER if all of it is above `up`, WORSE if below `down`, NO_DIFFERENCE if all of it is between, else INCONCLUSIVE.
    """
    if low > up:
        return BETTER
    if high < down:
        return WORSE
    return NO_DIFFERENCE if low >= down and high <= up else INCONCLUSIVE


class PairJudgement(NamedTuple):
    """Ratio or difference of two models on the same windows or items, its interval, and what `verdict_of` that says."""

    value: float | None
    low: float | None
    high: float | None
    verdict: str
    reason: str | None = None


def judge_pairs(
    base: Windows | Items,
    new: Windows | Items,
    *,
    higher_is_better: bool = False,
    difference: bool = False,
    threshold: float = THRESHOLD,
) -> PairJudgement:
    """`new` over `base`, or minus it, on the same windows of text or items of tasks.

    A change beyond the threshold counts, of a ratio a relative one.
    """
    if isinstance(base, Windows) and isinstance(new, Windows):
        found = compare_windows(base, new, difference=difference)
    else:
        assert not isinstance(base, Windows)
        assert not isinstance(new, Windows)
        found = compare_items(base, new, difference=difference)
    if found is None:
        return PairJudgement(None, None, None, INCONCLUSIVE, "no ratio of a figure that is 0")
    if found.low is None or found.high is None:
        return PairJudgement(*found, INCONCLUSIVE, "one window says nothing of its noise")
    low, high = (found.low, found.high) if higher_is_better else (-found.high, -found.low)
    if difference:
        verdict = verdict_of(low, high, threshold, -threshold)
    elif higher_is_better:
        verdict = verdict_of(low, high, 1 + threshold, 1 / (1 + threshold))
    else:
        verdict = verdict_of(low, high, -1 / (1 + threshold), -1 - threshold)
    return PairJudgement(
        *found, verdict, "the interval crosses the threshold" if verdict == INCONCLUSIVE else None
    )


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


VERDICTS = ("faster", "slower", NO_DIFFERENCE, INCONCLUSIVE, TOO_NOISY)
_OF_SPEED = {BETTER: "faster", WORSE: "slower"}

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

    threshold: float = setting(THRESHOLD, "Relative change that counts as a difference.", ge=0, lt=1)
    confidence: float = setting(CONFIDENCE, "Confidence of the interval.", ge=0.5, lt=1, rare=True)
    seed: int = setting(0, SEED, rare=True)


DEFAULTS = ComparisonSettings()


@dataclass(frozen=True)
class Comparison:
    """One row of a comparison."""

    kind: str  # How the numbers of both sides came about
    target: str  # Where both ran
    engine: str  # What both ran in
    test: str  # The workload, e.g. tg128.
    n_threads: int
    quantized_cache: str | None  # Type of both sides' key-value cache if it is quantized
    base: str  # File of the base
    new: str  # File held against it
    base_median_ns: float | None  # By the basis
    new_median_ns: float | None
    base_median_ts: float | None  # Tokens per second at that time; None if the workload is no rate
    new_median_ts: float | None
    ratio: float | None  # Speed of new / speed of base; None if it would mean nothing
    low: float | None  # The interval
    high: float | None
    confidence: float
    threshold: float  # Relative change that counts as a difference
    paired: bool  # Whether rounds of one interleaved session were compared pair by pair
    basis: str  # Whose time it is: `wall`, or `cpu` if other programs held a single thread up
    verdict: str  # One of VERDICTS
    reason: str | None  # Why the verdict is inconclusive or too noisy to tell
    peak_rss_ratio: float | None  # Peak memory of new / base
    file_size_ratio: float | None  # File size of new / base
    anchor: str | None = None  # File that both sessions measured in turns with theirs
    base_to_anchor: float | None = None  # Speed of base / speed of the anchor in its session
    new_to_anchor: float | None = None  # The same of new; `ratio` is the quotient of the two
    energy: EnergyRatio | None = None  # Joules a token of new / those of base, if energy was asked for


@dataclass(frozen=True)
class Incomparable:
    """Two rows that are not compared, or one that has no partner."""

    test: str
    n_threads: int
    base: str | None  # File of the base; None if only the new file has the row
    new: str | None
    reason: str  # What keeps them apart


Compared: TypeAlias = Comparison | Incomparable


def compare(
    base: Sequence[BenchRecord],
    new: Sequence[BenchRecord],
    settings: ComparisonSettings = DEFAULTS,
    anchors: Sequence[BenchRecord] = (),
) -> list[Compared]:
    """Compare row by row, in the order of `base`; rows that only `new` has come last.

    Sessions that had an anchor are compared by their ratios to it only; `anchors` are the anchors' own
    records. Raises InputError: no records of a side, or several of one row.
    """
    apart = {r.session for r in base}.isdisjoint(r.session for r in new)
    anchored = apart and any(r.anchor_sha256 for r in (*base, *new))
    left, right = _by_row(base, "base", anchored=anchored), _by_row(new, "new", anchored=anchored)
    if not left or not right:
        raise InputError("nothing to compare: no records of the base or of the new file")
    rows: list[Compared] = []
    alone = {key: one for key, one in right.items() if key not in left}
    for key, one in left.items():
        # If the other side has the same test, what keeps them apart is said.
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


def _beside(record: BenchRecord) -> tuple[str, ...]:
    return record.session, record.kind, record.target, record.test, str(record.n_threads)


def compare_records(
    base: BenchRecord,
    new: BenchRecord,
    settings: ComparisonSettings = DEFAULTS,
    anchors: Sequence[BenchRecord] = (),
) -> Compared:
    """Compare two records.

    `faster` or `slower`: the whole interval lies beyond the threshold. `no difference`: within it on both
    sides. `too noisy to tell`: other programs or the differences between rounds hide what the files do. Else
    `inconclusive`, as it is if a side failed or has fewer than MIN_SAMPLES. Raises InputError: a setting is
    out of range.
    """
    check_settings(settings)

    def apart(reason: str) -> Incomparable:
        return Incomparable(base.test, base.n_threads, base.model_filename, new.model_filename, reason)

    anchored = None
    if base.session != new.session and (base.anchor_sha256 or new.anchor_sha256):
        if base.anchor_sha256 != new.anchor_sha256:
            names = [(one.anchor_sha256 or "none")[:12] for one in (base, new)]
            return apart(f"the sessions had different anchors: {names[0]} and {names[1]}")
        rows = {_beside(record): record for record in anchors if record.is_anchor}
        if not {_beside(base), _beside(new)} <= rows.keys():
            return apart("the anchor's own row is not among the records")
        anchored = rows[_beside(base)], rows[_beside(new)]
    # An anchor stands for target and processor.
    ignored = ("target", "cpu_info") if anchored else ()
    names = [name for name in _COMPARABLE if getattr(base, name) != getattr(new, name)]
    sides = {name: (getattr(base, name), getattr(new, name)) for name in ("cpu_info", "backends")}
    names += [name for name, (left, right) in sides.items() if left and right and left != right]
    if names := [name for name in names if name not in ignored]:
        pairs = (f"{name} {getattr(base, name)!r} and {getattr(new, name)!r}" for name in names)
        return apart(f"they measure different things: {', '.join(pairs)}")
    found = judge(
        samples_of(base, "base"),
        samples_of(new, "new"),
        anchored and (samples_of(anchored[0], "base's anchor"), samples_of(anchored[1], "new's anchor")),
        confidence=settings.confidence,
        seed=settings.seed,
    )
    verdict, reason = INCONCLUSIVE if found.problem else TOO_NOISY, found.problem or found.noise
    up, interval = 1 + settings.threshold, found.interval
    if reason is None:
        verdict = verdict_of(interval.low, interval.high, up, 1 / up) if interval else INCONCLUSIVE
        verdict = _OF_SPEED.get(verdict, verdict)
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
    """Every file against the first one of its engine on its target, without anchors."""
    rows: list[Compared] = []
    models = [record for record in records if not record.is_anchor]
    for place in dict.fromkeys((one.target, one.engine) for one in models):
        base, *others = by_model([r for r in models if (r.target, r.engine) == place]).values()
        rows += [row for other in others for row in compare(base, other)]
    return rows
