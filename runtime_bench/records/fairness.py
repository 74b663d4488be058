"""What a row's figures are worth: whether conditions were fair, joules per token, and remarks in words.

Unfair rows are shown and never ranked with fair ones. A meter sees its whole domain, never a process by itself; joules
are refused if their error is more than a share of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any

from runtime_bench.records import summary
from runtime_bench.records.bench_record import EMULATED, THRASHES, BenchRecord
from runtime_bench.records.reported import METER_S, Conditions, Joules

VERDICTS = FAIR, THROTTLED, DISTURBED, NOT_KNOWN = "fair", "throttled", "disturbed", "not known"
CAP_LIMIT = 0.15
"""A run is throttled if a core's clock was capped by more than this meanwhile; a cap that stays favours no file."""
QUOTA_LIMIT = 0.05
"""Share of the time between two looks in which a quota held the group."""
HELD_LIMIT = 0.15
"""Share of a sample in which its thread, where the processor computes, neither computed nor waited."""
SLOWER_LIMIT = 1.25
"""Samples that take so many times as long as all before them have fallen behind."""
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
    reason: str | None = None  # Why it is not `fair`
    process: int | None = None  # The first that it holds of, from 1; None if unknown, or of the whole row
    from_s: float | None = None  # Second of that process since which it does

    @property
    def text(self) -> str:
        """For a table: the verdict, and since when."""
        since = "" if self.from_s is None else f" from second {self.from_s:.1f}"
        return self.verdict + since + (f" of process {self.process}" if self.process else "")


def fairness(record: BenchRecord) -> Fairness:
    """The verdict on a row: throttled before disturbed before not known."""
    found = unfair(record)
    if found is not None:
        return found
    others = stealing(record) or crowding(record)
    if others:
        return Fairness(DISTURBED, others)
    why = _unknown(record)
    return Fairness(NOT_KNOWN, why) if why else Fairness(FAIR)


def unfair(record: BenchRecord) -> Fairness | None:
    """Why a row's times tell of the device's state and not of the file, or None."""
    return next((found for judge in _JUDGES if (found := judge(record)) is not None), None)


def has_speed(record: BenchRecord) -> bool:
    """Whether its times say how fast the file is."""
    measured = record.ok and not record.void and record.kind != EMULATED and bool(record.samples_ns)
    return measured and unfair(record) is None


def noise(record: BenchRecord, *, wall: bool = True) -> str | None:
    """Why its times tell more of the machine than of the file, or None."""
    found = unfair(record)
    if found is not None:
        return f"{found.text}: {found.reason}"
    return stealing(record) or (crowding(record) if wall else None)


def _watched(record: BenchRecord) -> Iterator[tuple[int, Conditions]]:
    """Processes that somebody looked at, counted from 1."""
    yield from ((i, one) for i, one in enumerate(record.conditions, 1) if one is not None)


def capped_at(record: BenchRecord) -> float | None:
    """Highest clock that any core was allowed, as a share of the highest there is; None if unknown."""
    caps = [cap for _, one in _watched(record) for _, cap in one.during_samples("caps")]
    return max(caps, default=None)


def capped_apart(*of_rows: float | None) -> str | None:
    """Why rows ran at clocks too different to be compared, or None."""
    caps = [cap for cap in of_rows if cap is not None]
    if not caps or min(caps) >= (1 - CAP_LIMIT) * max(caps):
        return None
    return f"one ran with clocks capped at {min(caps):.0%} of the highest, another at {max(caps):.0%}"


def _slowed(record: BenchRecord) -> Fairness | None:
    """The first reading beyond a series' limit, a thread that was held, or a fall in speed."""
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
    """Power was saved, or a state was not the same in all of the run."""
    rows = (
        ("low_power", "the system saved power"),
        ("charging", "power from outside came or went"),
        ("screen_on", "the screen went on or off"),
    )
    for series, reason in rows:
        states = list(_values(record, series))
        for process, at, value in states:
            if value != (False if series == "low_power" else states[0][2]):
                return Fairness(DISTURBED, reason, process, at)
    return None


def _values(record: BenchRecord, series: str) -> Iterator[tuple[int, float, Any]]:
    """(process, second, value) of a series during samples."""
    for process, one in _watched(record):
        yield from ((process, at, value) for at, value in one.during_samples(series))


def _held(record: BenchRecord) -> Fairness | None:
    """A thread that something stopped again and again: cpulimit, or a quota that nobody may see."""
    if not record.on_processor:
        return None
    samples = list(zip(record.rounds, record.samples_ns, record.held_samples_ns, strict=False))
    stolen = dict(enumerate(one.stolen_cores if one else 0.0 for one in record.contention))
    shares = [(held or 0) / ns - stolen.get(process, 0.0) for process, ns, held in samples]
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
    """Samples that all take longer than all before them, if nothing shows the clocks."""
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
    """A sample that took another time by the clock that runs on while the machine sleeps."""
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
    """Why nothing can be said of a row; None if enough was seen to call it fair."""
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
    """Begin and end of each sample, seconds of its process; None if unknown."""
    left = [iter(one.samples_s if one else ()) for one in record.conditions]
    return [next(left[process], None) if process < len(left) else None for process in record.rounds]


def _place(record: BenchRecord, place: int) -> tuple[int, float | None]:
    """Process of a sample, counted from 1, and its second in that."""
    span = _spans(record)[place]
    return record.rounds[place] + 1, None if span is None else max(0.0, span[0])


def crowding(record: BenchRecord) -> str | None:
    """Why wall time tells more of other programs than of the file, or None."""
    cores = record.environment.cpus_usable
    n_threads, total = record.n_threads, sum(record.samples_ns)
    shares = []
    # More threads than cores wait for each other.
    if n_threads <= (cores or n_threads):
        if record.samples_ns and len(record.waited_samples_ns) == len(record.samples_ns):
            shares.append(sum(record.waited_samples_ns) / (total * n_threads))
        known = [one.others_cores + one.stolen_cores for one in record.contention if one is not None]
        if known and cores:
            shares.append(max(0.0, statistics.fmean(known) + n_threads - cores) / n_threads)
    # Threads wait a little for each other on an idle machine, too: if both are known, both have to say it.
    share = min(shares, default=0.0)
    if has_processor_time(record) and None not in record.held_samples_ns:  # None: it waited for the disk
        share = max(share, 1 - sum(record.cpu_samples_ns) / total)
    return f"other programs took {share:.0%} of the time of its threads" if share > CROWDED_SHARE else None


def stealing(record: BenchRecord) -> str | None:
    """Why its processor time tells no more than the clock (a host took the cores away), or None."""
    known = [one.stolen_cores for one in record.contention if one is not None]
    share = statistics.fmean(known) / record.n_threads if known else 0.0
    taken = f"the host of this machine took {share:.0%} of the time of its threads"
    return taken if share > CROWDED_SHARE else None


def has_processor_time(record: BenchRecord) -> bool:
    """Whether its processor time tells of the file: several threads spend it waiting for each other."""
    timed = len(record.cpu_samples_ns) == len(record.samples_ns) > 0
    return timed and record.n_threads == 1 and record.on_processor


ERROR_LIMIT = 0.1
"""Largest error, as a share of the energy."""
NOTHING = Joules(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class EnergyRatio:
    """Joules a token of new / those of base, by one meter; without a ratio `reason` says why."""

    meter: str | None = None
    ratio: float | None = None  # below 1 takes less
    low: float | None = None  # by the meter's error
    high: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class EnergyAccount:
    """What a meter says of a row: joules of one token, or the reason why there are none."""

    meter: str = "no meter"
    joules: Joules | None = None
    of_processes: tuple[float, ...] = ()  # joules per token of each process
    reason: str | None = None


def energy(record: BenchRecord) -> EnergyAccount | None:
    """The account of the first meter that reports something; None if energy was not asked for."""
    if not record.energy:
        return None
    reasons = (
        (not record.ok, "it failed"),
        (record.kind == EMULATED, "an emulator's energy says nothing"),
        (record.void, f"what it writes is degenerate ({record.degenerate})"),
        (not record.samples_ts, f"{record.workload} is no rate of tokens"),
    )
    if why := next((reason for holds, reason in reasons if holds), None):
        return EnergyAccount(reason=why)
    meters = dict.fromkeys((m.method, m.domain) for one in record.energy if one for m in one.meters)
    hidden = "; ".join(dict.fromkeys(one.hidden for one in record.energy if one and one.hidden))
    found = [_account(record, *meter) for meter in meters]
    if not found:
        return EnergyAccount(reason=hidden or "no meter was read")
    first = replace(found[0], reason="; ".join(filter(None, (found[0].reason, hidden))))
    return next((one for one in found if one.reason is None), first)


def _account(record: BenchRecord, method: str, domain: str) -> EnergyAccount:
    meter, told = f"{method}, {domain}", []
    for number, one in enumerate(record.energy, 1):
        meters = one.meters if one else ()
        metered = next((m for m in meters if (m.method, m.domain) == (method, domain)), None)
        if metered is None:
            return EnergyAccount(meter, reason=f"process {number} of {len(record.energy)} was not metered so")
        if metered.joules is None or metered.seconds <= 0:
            return EnergyAccount(meter, reason=metered.problem or "it says nothing")
        told.append(metered)
    total = reduce(add, (one.joules for one in told if one.joules))
    if total.value <= 0 or total.error > ERROR_LIMIT * total.value:
        share = total.error / total.value if total.value > 0 else 1.0
        sample_s = sum(one.seconds for one in told) / len(record.samples_ns)
        # The error is that of the samples' ends.
        needed_s = max(share * sample_s, 2 * METER_S) / ERROR_LIMIT
        why = f"known to ± {share:.0%} only, and ± {ERROR_LIMIT:.0%} is wanted: the samples are too short for the meter"
        return EnergyAccount(
            meter, reason=f"{why}; about {record.n_tokens * needed_s / sample_s:.0f} tokens each would do"
        )
    tokens = [record.n_tokens * record.rounds.count(process) for process in range(len(told))]
    each = [one.joules.value / n for one, n in zip(told, tokens, strict=True) if one.joules and n]
    return EnergyAccount(
        meter,
        total.times(1 / (record.n_tokens * len(record.samples_ns))),
        tuple(each) if len(each) == len(told) else (),
    )


def energy_ratio(base: BenchRecord, new: BenchRecord) -> EnergyRatio | None:
    """The ratio, of one meter of one machine; None if energy was asked for on neither side."""
    if not (base.energy or new.energy):
        return None
    found = energy(base), energy(new)
    for side, record, account in zip(("base", "new"), (base, new), found, strict=True):
        if (state := unfair(record)) is not None:
            return EnergyRatio(reason=f"{side}: {state.text}: {state.reason}")
        if account is None or account.joules is None:
            reason = account.reason if account else "energy was not asked for"
            return EnergyRatio(reason=f"{side}: {reason}")
    left, right = (one for one in found if one)
    if (base.target, base.cpu_info) != (new.target, new.cpu_info):
        return EnergyRatio(reason="they were metered on different machines")
    if left.meter != right.meter:
        return EnergyRatio(reason=f"different meters: {left.meter} and {right.meter}")
    if apart := capped_apart(capped_at(base), capped_at(new)):
        return EnergyRatio(reason=apart)
    one, other = (account.joules or NOTHING for account in (left, right))
    return EnergyRatio(left.meter, other.value / one.value, other.low / one.high, other.high / one.low)


def note_of(record: BenchRecord) -> str | None:
    """Every remark on a record, or None."""
    notes: list[str | None] = []
    if record.kind == EMULATED:
        notes.append("emulated: that it ran counts, its times say nothing")
    if record.void:
        notes.append(f"void: what it writes is degenerate ({record.degenerate})")
    if record.fallback:
        notes.append(f"{record.fallback} was asked for, and the CPU computed")
    nodes = record.engine_settings.providers
    if len(nodes) > 1 and nodes.get("CPU"):
        notes.append(f"{nodes['CPU']} of {sum(nodes.values())} nodes of the graph run on the CPU")
    if record.memory_verdict == THRASHES and record.memory_limit_bytes is not None:
        again, limit = ((size or 0) / 2**20 for size in (record.reread_bytes, record.memory_limit_bytes))
        notes.append(
            f"thrashes: under the limit of {limit:.0f} MiB, {again:.0f} MiB of the file were read again"
        )
    notes.append(record.throttling.text if record.throttling else None)
    if record.quarantined_ns and record.spread_limit is not None:
        before, after = summary.spread(record.quarantined_ns) or 0.0, record.spread or 0.0
        outcome = "still wide" if after > record.spread_limit else "then within it"
        notes.append(
            f"p90/p50 {before:.2f} over the limit {record.spread_limit:.2f}: measured once more, {outcome}"
        )
    if found := unfair(record):
        notes.append(f"{found.text}: {found.reason}")
    else:
        if (cap := capped_at(record)) and cap < 1 - CAP_LIMIT:
            notes.append(f"clocks were capped at {cap:.0%} of the highest all the time")
        notes += [stealing(record), crowding(record)]
    if record.ok and record.n_tokens and (account := energy(record)) and account.reason:
        notes.append(f"no joules per token ({account.meter}): {account.reason}")
    return "; ".join(filter(None, notes)) or None
