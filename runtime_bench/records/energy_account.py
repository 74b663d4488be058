"""Joules a token of a row, from what meters told of its processes: all repetitions together.

Energy is refused where its error is more than a share of it. What an idle machine takes is shown beside it, and taken
off: both are of the meter's whole domain, and none is of the process alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

from runtime_bench.records.bench_record import EMULATED, BenchRecord
from runtime_bench.records.energy import GLANCE_S, NOTHING, Joules, Metered

ERROR_LIMIT = 0.1
"""Of the energy, by which it may be wrong either way."""


@dataclass(frozen=True)
class EnergyAccount:
    """What one meter says of a row. Joules are of one token."""

    method: str | None = None  # How it was metered; None where nothing could be
    domain: str | None = None  # Of what
    n_tokens: int = 0  # Of all samples
    seconds: float = 0.0  # Of all samples
    joules: Joules | None = None  # The meter's, of everything in its domain; None where `reason` says why
    idle_w: float | None = None  # What the domain took before the processes; None where `net_reason` says why
    net_joules: Joules | None = None  # Less what the domain would have taken idle in that time
    step: float | None = None  # Of the meter: joules of one that counts, watts of one that shows power
    update_s: float | None = None  # Seconds from one change of its reading to the next
    reason: str | None = None  # Why nothing can be said
    net_reason: str | None = None  # Why nothing can be said without what an idle machine takes

    @property
    def meter(self) -> str:
        """What metered what, in words."""
        return f"{self.method}, {self.domain}" if self.method else "no meter"


def accounts(record: BenchRecord) -> tuple[EnergyAccount, ...]:
    """What each meter says, those first that say something; empty where energy was not asked for."""
    if not record.energy:
        return ()
    if why := _no_rate(record):
        return (EnergyAccount(reason=why),)
    meters = dict.fromkeys((m.method, m.domain) for one in record.energy if one for m in one.meters)
    whys = dict.fromkeys(one.hidden for one in record.energy if one and one.hidden)
    if not meters:
        return (EnergyAccount(reason="; ".join(whys) or "nobody looked at any meter"),)
    found = sorted((_account(record, *meter) for meter in meters), key=lambda one: one.reason is not None)
    first = found[0]
    if first.reason and whys:  # what may not be read might have told more
        found[0] = replace(first, reason="; ".join((first.reason, *whys)))
    return tuple(found)


def joules_of_processes(record: BenchRecord, account: EnergyAccount) -> tuple[float, ...]:
    """Joules a token of each process, as the account's meter told them, in the order of the row.

    Empty where it did not tell of all of them.
    """
    found = []
    for process, told in enumerate(_of_meter(record, account.method, account.domain)):
        tokens = record.n_tokens * record.rounds.count(process)
        if told is None or told.joules is None or not tokens:
            return ()
        found.append(told.joules.value / tokens)
    return tuple(found)


def energy(record: BenchRecord) -> EnergyAccount | None:
    """What the first of the meters that say something says; None where energy was not asked for."""
    return next(iter(accounts(record)), None)


def _no_rate(record: BenchRecord) -> str | None:
    """Why there are no joules a token of a row, whatever the meters say."""
    if not record.ok:
        return "it failed"
    if record.kind == EMULATED:
        return "an emulator's energy says nothing"
    if record.void:
        return f"what it writes is degenerate ({record.degenerate})"
    return None if record.samples_ts else f"{record.workload} is no rate of tokens"


def _account(record: BenchRecord, method: str, domain: str) -> EnergyAccount:
    """Of all samples together; the processes must all have been metered."""
    found = _of_meter(record, method, domain)
    told = [one for one in found if one is not None]
    about = EnergyAccount(
        method,
        domain,
        n_tokens=record.n_tokens * len(record.samples_ns),
        seconds=sum(one.seconds for one in told),
        step=told[0].step,
        update_s=max((one.update_s for one in told if one.update_s is not None), default=None),
    )
    if why := _not_told(found):
        return replace(about, reason=why)
    total = _sum(one.joules for one in told)
    if total.value <= 0 or total.error > ERROR_LIMIT * total.value:
        return replace(about, reason=_too_short(record, about, total, counts=told[0].counts))
    return _with_idle(replace(about, joules=total.times(1 / about.n_tokens)), told, total)


def _of_meter(record: BenchRecord, method: str | None, domain: str | None) -> list[Metered | None]:
    """What one meter told of each process; None of those of which it did not."""
    return [
        next((m for m in one.meters if (m.method, m.domain) == (method, domain)), None) if one else None
        for one in record.energy
    ]


def _not_told(found: Sequence[Metered | None]) -> str | None:
    """The first reason for which a process has no joules."""
    for place, one in enumerate(found, 1):
        if one is None:
            return f"process {place} of {len(found)} was not metered so"
        if one.joules is None or one.seconds <= 0:
            return one.problem or "it says nothing"
    return None


def _too_short(record: BenchRecord, about: EnergyAccount, total: Joules, *, counts: bool) -> str:
    """Why the error is too large, and how long a sample would do."""
    if total.value <= 0:
        return "nothing was metered in the samples"
    share, watts, step = total.error / total.value, total.value / about.seconds, about.step or 0.0
    if not counts and step / 2 > ERROR_LIMIT * watts:
        return f"its steps of {step:.3g} W are too coarse for {watts:.3g} W"
    # The error is that of the samples' ends, and no more than all of what they hold.
    ends_s = (about.update_s or 0.0) + 2 * GLANCE_S + (step / watts if counts else 0.0)
    sample_s = about.seconds / len(record.samples_ns)
    needed_s = max(ends_s, share * sample_s) / ERROR_LIMIT
    told = f"known to ± {share:.0%} only, and ± {ERROR_LIMIT:.0%} is wanted: the samples are too short for the meter"
    tokens = record.n_tokens * needed_s / sample_s
    return f"{told}; about {tokens:.0f} tokens each, {needed_s:.3g} s, would do, or as much in samples of one process"


def _with_idle(account: EnergyAccount, told: Sequence[Metered], total: Joules) -> EnergyAccount:
    """The account with what the domain takes idle, and without it."""
    idle_s = sum(one.idle_seconds for one in told)
    if idle_s <= 0 or any(one.idle_joules is None for one in told):
        return replace(account, net_reason="nobody metered the machine before it began")
    idle = _sum(one.idle_joules for one in told).times(1 / idle_s)
    if idle.error * account.seconds > ERROR_LIMIT * total.value:
        needed = idle_s * idle.error * account.seconds / (ERROR_LIMIT * total.value) / len(told)
        why = f"idle power is known to {idle.low:.3g} to {idle.high:.3g} W only; --idle {needed:.0f} would do"
        return replace(account, net_reason=why)
    net = (total - idle.times(account.seconds)).times(1 / account.n_tokens)
    return replace(account, idle_w=idle.value, net_joules=net)


def _sum(parts: Iterable[Joules | None]) -> Joules:
    return reduce(add, filter(None, parts), NOTHING)
