"""Whether a row was measured under fair conditions, and if not, since when and why.

Rows that were throttled, or disturbed by the device's own state, are shown and never ranked with fair ones. What other
programs took from a row disturbs it, too, and has a remedy: processor time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from runtime_bench.records.bench_record import EMULATED, BenchRecord
from runtime_bench.records.reported import Conditions

VERDICTS = FAIR, THROTTLED, DISTURBED, NOT_KNOWN = "fair", "throttled", "disturbed", "not known"
CAP_LIMIT = 0.15
"""A run is throttled where a core's clock was capped by more than this meanwhile; a cap that stays favours no file."""
QUOTA_LIMIT = 0.05
"""Share of the time between two looks in which a quota held the group."""
HELD_LIMIT = 0.15
"""Share of a sample in which its thread, where the processor computes, neither computed nor waited."""
SLOWER_LIMIT = 1.25
"""Samples that take so many times as long as all before them have fallen behind, where nothing shows the clocks."""
CLOCK_LIMIT = 0.1
"""Share by which two clocks may differ on how long a sample took."""
_LEAST_HALF = 2
"""Fewest samples on each side of a fall."""
_LEAST_HELD_NS, _LEAST_CLOCK_S = 5_000_000, 0.02
"""Less than that is a hiccup, however short the sample."""

CROWDED_SHARE = 0.1
"""Of their time that threads may go without a core before a row counts as crowded."""


@dataclass(frozen=True)
class Fairness:
    """The verdict on a row."""

    verdict: str  # One of VERDICTS
    reason: str | None = None  # Why it is not `fair`; None where it is
    # The first process that it holds of, counted from 1 in the order of the row; None where that is not
    # known, or it holds of the whole row
    process: int | None = None
    from_s: float | None = None  # Second of that process since which it does

    @property
    def text(self) -> str:
        """For a table: the verdict, and since when."""
        since = "" if self.from_s is None else f" from second {self.from_s:.1f}"
        return self.verdict + since + (f" of process {self.process}" if self.process else "")


def fairness(record: BenchRecord) -> Fairness:
    """The verdict on a row: throttled before disturbed, and both before whatever is not known."""
    found = unfair(record)
    if found is not None:
        return found
    others = stealing(record) or crowding(record)
    if others:
        return Fairness(DISTURBED, others)
    why = _unknown(record)
    return Fairness(NOT_KNOWN, why) if why else Fairness(FAIR)


def unfair(record: BenchRecord) -> Fairness | None:
    """Why a row's times tell of the device's state and not of the file; None where nothing says so."""
    return next((found for judge in _JUDGES if (found := judge(record)) is not None), None)


def has_speed(record: BenchRecord) -> bool:
    """Whether its times say how fast the file is: not of failed rows, of degenerate text, by an emulator's clock, or
    under conditions that were not fair."""
    measured = record.ok and not record.void and record.kind != EMULATED and bool(record.samples_ns)
    return measured and unfair(record) is None


def noise(record: BenchRecord, *, wall: bool = True) -> str | None:
    """Why its times tell more of the machine than of the file; None where they tell of the file."""
    found = unfair(record)
    if found is not None:
        return f"{found.text}: {found.reason}"
    return stealing(record) or (crowding(record) if wall else None)


def _watched(record: BenchRecord) -> Iterator[tuple[int, Conditions]]:
    """Processes that somebody looked at, counted from 1."""
    yield from ((i, one) for i, one in enumerate(record.conditions, 1) if one is not None)


def capped_at(record: BenchRecord) -> float | None:
    """The share of its highest clock that every core of a row was allowed at best; None where nothing tells."""
    caps = [cap for _, one in _watched(record) for _, cap in one.during_samples("caps")]
    return max(caps, default=None)


def capped_apart(*of_rows: float | None) -> str | None:
    """Why rows ran at clocks too different to be compared; None where they did not, or nothing tells."""
    caps = [cap for cap in of_rows if cap is not None]
    if not caps or min(caps) >= (1 - CAP_LIMIT) * max(caps):
        return None
    return f"one ran with clocks capped at {min(caps):.0%} of the highest, another at {max(caps):.0%}"


def _slowed(record: BenchRecord) -> Fairness | None:
    """The first process and second at which a series is beyond its limit."""
    caps = [cap for _, one in _watched(record) for _, cap in one.during_samples("caps")]
    free = (1 - CAP_LIMIT) * max(caps, default=0.0)  # a cap that stays favours no file
    limits: tuple[tuple[str, Callable[[Any], bool], Callable[..., Any], str], ...] = (
        ("caps", lambda cap: cap < free, min, "clocks were capped at {:.0%} of the highest"),
        ("thermal_status", lambda status: status > 0, max, "the system's thermal status was {}"),
        (
            *("held_share", lambda share: share > QUOTA_LIMIT, max),
            "a quota of its control group held it for up to {:.0%} of the time",
        ),
    )
    for series, beyond, worst, reason in limits:
        if found := [one for one in _values(record, series) if beyond(one[2])]:
            return Fairness(THROTTLED, reason.format(worst(value for *_, value in found)), *found[0][:2])
    return _held(record) or _fell_behind(record)


def _changed(record: BenchRecord) -> Fairness | None:
    """A state that was not the same in all of the run: with whatever changes it, the speed does. Or power was saved."""
    for process, at, saved in _values(record, "low_power"):
        if saved:
            return Fairness(DISTURBED, "the system saved power", process, at)
    for series, reason in _STATES.items():
        states = list(_values(record, series))
        for process, at, value in states:
            if value != states[0][2]:
                return Fairness(DISTURBED, reason, process, at)
    return None


def _values(record: BenchRecord, series: str) -> Iterator[tuple[int, float, Any]]:
    """(process, second, value) of a series during samples."""
    for process, one in _watched(record):
        yield from ((process, at, value) for at, value in one.during_samples(series))


_STATES = {
    "charging": "power from outside came or went",
    "screen_on": "the screen went on or off",
}


def _held(record: BenchRecord) -> Fairness | None:
    """A thread that something stopped again and again, as cpulimit does, or a quota that nobody may see."""
    if not record.on_processor:
        return None
    samples = list(zip(record.rounds, record.samples_ns, record.held_samples_ns, strict=False))
    shares = [(held or 0) / ns - _stolen(record, process) for process, ns, held in samples]
    beyond = [
        place
        for place, (_, _, held) in enumerate(samples)
        if held is not None and held > _LEAST_HELD_NS and shares[place] > HELD_LIMIT
    ]
    if not beyond:
        return None
    most = max(shares[place] for place in beyond)
    why = f"something stopped it for up to {most:.0%} of a sample, and no other program had its cores"
    return Fairness(THROTTLED, why, *_place(record, beyond[0]))


def _fell_behind(record: BenchRecord) -> Fairness | None:
    """Where nothing shows the clocks: samples that all take longer than all before them did."""
    if _shows_caps(record) or not any(_watched(record)) or stealing(record) or crowding(record):
        return None
    known = len(record.waited_samples_ns) == len(record.samples_ns)
    waited = record.waited_samples_ns if known else (0,) * len(record.samples_ns)
    times = [max(1.0, ns - w / record.n_threads) for ns, w in zip(record.samples_ns, waited, strict=True)]
    slowest_before = list(accumulate(times, max))
    fastest_after = list(accumulate(reversed(times), min))[::-1]
    for first in range(_LEAST_HALF, len(times) - _LEAST_HALF + 1):
        if fastest_after[first] > SLOWER_LIMIT * slowest_before[first - 1]:
            times_as_long = statistics.median(times[first:]) / statistics.median(times[:first])
            why = f"samples took {times_as_long:.2f} times as long from then on, and nothing shows the clocks"
            return Fairness(THROTTLED, why, *_place(record, first))
    return None


def _clock(record: BenchRecord) -> Fairness | None:
    """A sample that took another time by the clock that goes on while the machine sleeps."""
    for place, (ns, span) in enumerate(zip(record.samples_ns, _spans(record), strict=True)):
        if span is None:
            continue
        seconds, other = ns / 1e9, span[1] - span[0]
        if abs(other - seconds) > max(CLOCK_LIMIT * seconds, _LEAST_CLOCK_S):
            why = f"a clock went wrong: a sample took {seconds:.2f} s by one and {other:.2f} s by another"
            return Fairness(DISTURBED, why, *_place(record, place))
    return None


_JUDGES = (_slowed, _changed, _clock)
"""What can be unfair, the likeliest cause of a lower speed first."""


def _unknown(record: BenchRecord) -> str | None:
    """Why nothing can be said of a row; None where enough was seen to call it fair."""
    if not record.samples_ns:
        return "there are no samples"
    watched = [one for _, one in _watched(record)]
    if len(watched) < len(set(record.rounds)):
        return "nobody looked at the machine during the run"
    blind = next((one for one in watched if not one.at_s), None)
    if blind is not None:
        return next(iter(blind.hidden.values()), "no look was taken")
    if _shows_caps(record):
        return None
    hidden = watched[0].hidden.get("caps", "not every look showed the clocks")
    if len(record.samples_ns) < 2 * _LEAST_HALF:
        return f"{hidden}, and {len(record.samples_ns)} samples are too few to show a fall"
    seen = any(held is not None for held in record.held_samples_ns) or all(one.held_share for one in watched)
    return None if seen else f"{hidden}, and nothing tells what keeps a process from running"


def _shows_caps(record: BenchRecord) -> bool:
    watched = [one for _, one in _watched(record)]
    return bool(watched) and all(one.during_samples("caps") for one in watched)


def _spans(record: BenchRecord) -> list[tuple[float, float] | None]:
    """When each sample began and ended, seconds of its process; None where that is not known."""
    left = [iter(one.samples_s if one else ()) for one in record.conditions]
    return [next(left[process], None) if process < len(left) else None for process in record.rounds]


def _place(record: BenchRecord, place: int) -> tuple[int, float | None]:
    """Process of a sample, counted from 1, and its second in that."""
    span = _spans(record)[place]
    return record.rounds[place] + 1, None if span is None else max(0.0, span[0])


def _stolen(record: BenchRecord, process: int) -> float:
    """Cores that the host of a virtual machine took away while a process ran."""
    known = record.contention[process] if process < len(record.contention) else None
    return known.stolen_cores if known else 0.0


def crowding(record: BenchRecord) -> str | None:
    """Why the clock on the wall tells more of other programs than of the file; None where nothing says so."""
    shares = [share for share in (_waiting(record), _taken(record)) if share is not None]
    # Threads wait a little for each other on an idle machine, too: where both are known, both have to say it.
    share = max(min(shares, default=0.0), _held_up(record))
    return f"other programs took {share:.0%} of the time of its threads" if share > CROWDED_SHARE else None


def stealing(record: BenchRecord) -> str | None:
    """Why its processor time tells no more than the clock: a host took the cores away; None where it did not."""
    known = [one.stolen_cores for one in record.contention if one is not None]
    share = statistics.fmean(known) / record.n_threads if known else 0.0
    taken = f"the host of this machine took {share:.0%} of the time of its threads"
    return taken if share > CROWDED_SHARE else None


def has_processor_time(record: BenchRecord) -> bool:
    """Whether its processor time tells of the file, too. Several threads spend it in waiting for each other, and where
    another chip computes it tells of next to nothing."""
    timed = len(record.cpu_samples_ns) == len(record.samples_ns) > 0
    return timed and record.n_threads == 1 and record.on_processor


def _waiting(record: BenchRecord) -> float | None:
    """Share of their time that its threads waited for a core; more threads than cores wait for each other."""
    if len(record.waited_samples_ns) != len(record.samples_ns) or not record.samples_ns or _too_many(record):
        return None
    return sum(record.waited_samples_ns) / (sum(record.samples_ns) * record.n_threads)


def _taken(record: BenchRecord) -> float | None:
    """Share of the cores that its threads need and others used."""
    known = [one.others_cores + one.stolen_cores for one in record.contention if one is not None]
    cores = record.environment.cpus_usable
    if not known or not cores or _too_many(record):
        return None
    return max(0.0, statistics.fmean(known) + record.n_threads - cores) / record.n_threads


def _held_up(record: BenchRecord) -> float:
    """Share of its time that a single thread did not compute. Of several nobody can tell: they wait for each other; nor
    of one that waits for another chip."""
    if not has_processor_time(record) or None in record.held_samples_ns:  # it waited for the disk
        return 0.0
    return 1 - sum(record.cpu_samples_ns) / sum(record.samples_ns)


def _too_many(record: BenchRecord) -> bool:
    return record.n_threads > (record.environment.cpus_usable or record.n_threads)
