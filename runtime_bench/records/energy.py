"""Joules a token of a row, all its processes together; refused if the error is more than a share of it.

A meter sees its whole domain, never a process by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from runtime_bench.records.bench_record import EMULATED, BenchRecord
from runtime_bench.records.fairness import capped_apart, capped_at, unfair
from runtime_bench.records.reported import METER_S, Joules

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
    of_processes: tuple[float, ...] = ()  # joules a token of each process
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
