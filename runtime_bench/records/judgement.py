"""The one judgement about two sets of samples, which comparisons, reports, budgets and histories ask.

Speed is 1 / median time. The time is the clock's, or the processor's where other programs held a single thread up. If
the machine was so busy that neither tells of the files, there is no ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime_bench.records import summary
from runtime_bench.records.bench_record import EMULATED, BenchRecord
from runtime_bench.records.fairness import capped_apart, capped_at, has_processor_time
from runtime_bench.records.fairness import noise as noise_of
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
