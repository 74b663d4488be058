"""The one judgement about two sets of samples, which comparisons, reports, budgets and histories ask.

Speed is 1 / median time. The time is the clock's, or the processor's where other programs held a single thread up. If
the machine was so busy that neither tells of the files, there is no ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from runtime_bench.records import summary
from runtime_bench.records.bench_record import EMULATED, BenchRecord
from runtime_bench.records.fairness import capped_apart, capped_at, has_processor_time, noise
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
    times: Sequence[float]  # Less is better; in the order taken
    rounds: Sequence[int] = ()  # For each, the process that it came from; each is one of its own where empty
    # The same by the processor's clock; empty where that clock does not tell of the file
    cpu_times: Sequence[float] = ()
    session: str | None = None  # Rows of one session took turns; None where that is not known
    # Why nothing is said of it, whatever its times; None where nothing keeps it from being judged
    problem: str | None = None
    # Why its times tell more of the machine than of the file; None where they do not
    noise: str | None = None
    cpu_noise: str | None = None  # The same of `cpu_times`
    loaded: str | None = None  # State of the page cache, where the opening of the file is timed
    # Share of the highest clock that it was held to (`capped_at`); None where nothing tells
    cap: float | None = None
    looks: int = 1  # How often they may have been looked at to decide whether to take more

    @property
    def n_independent(self) -> int:
        """Independent samples: those of one process share what that process met."""
        return len(set(self.rounds)) if len(self.rounds) == len(self.times) else len(self.times)

    def too_few(self, confidence: float) -> str | None:
        """Why it has too few samples for a verdict of such a confidence; None where it has enough.

        More are asked only of what was measured on: a baseline cannot be.
        """
        wanted = fewest(surer(confidence, self))
        if self.n_independent >= wanted:
            return None
        independent = "samples" if self.n_independent == len(self.times) else "processes"
        return f"{self.name} has {self.n_independent} {independent}, a verdict needs {wanted}"


def fewest(confidence: float) -> int:
    """Fewest independent samples whose range covers the median about as surely."""
    return max(MIN_SAMPLES, math.ceil(1 - math.log2(1.25 * (1 - confidence)) - 1e-9))


def surer(confidence: float, *sides: Samples) -> float:
    """The confidence of each of several looks, of which together one errs no more often than a single one would
    (Bonferroni)."""
    looks = max(one.looks for one in sides)
    return confidence if looks == 1 else 1 - (1 - confidence) / looks


class _How(TypedDict):
    """How an interval is taken."""

    confidence: float
    seed: int
    resamples: int


@dataclass(frozen=True)
class Judgement:
    """What two sets of samples say of each other."""

    confidence: float  # Of the interval
    basis: str  # Whose time it is: `wall`, or `cpu` where other programs held a single thread up
    paired: bool  # Whether rounds of one interleaved session were compared pair by pair
    # Median time of base and new, then of their anchors, by the basis; None where a side has no samples
    medians: tuple[float | None, ...]
    # Speed of new / speed of base; None where a side has no samples. With `noise` it means nothing.
    interval: RatioInterval | None
    # Why there is no verdict, however steady the samples are; None where there may be one
    problem: str | None
    noise: str | None  # Why the samples say nothing of the files; None where they do

    @property
    def shown(self) -> RatioInterval | None:
        """The interval, where it means something."""
        return None if self.noise else self.interval


def samples_of(record: BenchRecord, name: str) -> Samples:
    """A row's samples; `name` is what reasons call it."""
    return Samples(
        name,
        () if record.kind == EMULATED else record.samples_ns,
        record.rounds,
        cpu_times=record.cpu_samples_ns if has_processor_time(record) else (),
        session=record.session,
        problem=_problem(record, name),
        noise=noise(record) if record.ok else None,
        cpu_noise=noise(record, wall=False) if record.ok else None,
        loaded=record.page_cache_state if record.timed.opens else None,
        cap=capped_at(record),
        looks=record.measured_on.looks if record.measured_on else 1,
    )


def _problem(record: BenchRecord, name: str) -> str | None:
    if not record.ok:
        return f"{name} failed: {record.failure}"
    if record.kind == EMULATED:
        return "emulated times say nothing"
    if record.void:
        return f"{name} writes degenerate text ({record.degenerate}), its speed is void"
    wish, state = record.page_cache, record.page_cache_state
    if wish in ("warm", "cold") and state not in (wish, "unknown"):
        return f"{name} was to be loaded {wish}, and was {state}"
    return None


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

    Args:
        base: What is divided by.
        new: What is judged.
        anchors: Of base's session and of new's: speeds in multiples of theirs are compared.
        confidence: Of the interval; surer of samples that are looked at several times.
        seed: Of the bootstrap.
        resamples: Its draws.
    """
    asked, confidence = confidence, surer(confidence, base, new)
    sides = (base, new, *(anchors or ()))
    # What noise only the clock on the wall has, the processor's clock sees through.
    by_cpu = all(one.cpu_times for one in sides) and any(one.noise and not one.cpu_noise for one in sides)
    times = [one.cpu_times if by_cpu else one.times for one in sides]
    paired = base.session is not None and base.session == new.session and base.rounds == new.rounds
    interval, rounds = None, [one.rounds for one in sides]
    how: _How = {"confidence": confidence, "seed": seed, "resamples": resamples}
    if all(times) and anchors:
        interval = quotient_interval(
            (times[3], times[1]), (rounds[3], rounds[1]), (times[2], times[0]), (rounds[2], rounds[0]), **how
        )
    elif all(times):
        interval = ratio_interval(
            *times, paired=paired, numerator_rounds=rounds[0], denominator_rounds=rounds[1], **how
        )
    return Judgement(
        confidence=confidence,
        basis="cpu" if by_cpu else "wall",
        paired=paired,
        medians=tuple(map(summary.median, times)),
        interval=interval,
        problem=_unjudged(sides, asked),
        noise=_noise(sides, interval, by_cpu=by_cpu),
    )


def _unjudged(sides: Sequence[Samples], confidence: float) -> str | None:
    """Why nothing can be said, however steady the samples are."""
    found = next((why for one in sides if (why := one.problem or one.too_few(confidence))), None)
    base, new, *_ = sides
    if found is None and base.loaded != new.loaded:
        return f"{base.name} was loaded {base.loaded}, {new.name} {new.loaded}"
    return found


def _noise(sides: Sequence[Samples], interval: RatioInterval | None, *, by_cpu: bool) -> str | None:
    """Why the times say nothing of the files; None where they do."""
    for one in sides:
        if why := one.cpu_noise if by_cpu else one.noise:
            return f"{one.name}: {why}"
    base, new, *anchors = sides
    beside = zip((base, new), anchors, strict=True) if anchors else [(base, new)]
    if apart := next(filter(None, (capped_apart(*(one.cap for one in pair)) for pair in beside)), None):
        return apart
    if interval and interval.high > WIDEST * interval.low:
        width = interval.high / interval.low
        return f"the rounds differ too much: one end of the interval is {width:.1f} times the other"
    return None
