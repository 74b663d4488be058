"""Joules a token of two rows against each other, as one meter told them.

What a meter measures is more than the process, and another meter measures something else: only what the same method
told of the same domain of one machine is compared, all of it. What is left without an idle machine's share is a small
difference, and has no ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.energy import Joules
from runtime_bench.records.energy_account import accounts
from runtime_bench.records.fairness import capped_apart, capped_at, unfair


@dataclass(frozen=True)
class EnergyRatio:
    """Joules a token of new / those of base."""

    meter: str | None = None  # What metered what on both sides; None where no meter told of both
    ratio: float | None = None  # Below 1 takes less; None where `reason` says why
    low: float | None = None  # It is not less, by what the meter may be wrong
    high: float | None = None  # It is not more
    reason: str | None = None  # Why there is none


def energy_ratio(base: BenchRecord, new: BenchRecord) -> EnergyRatio | None:
    """The ratio by the first meter that told of both; None where energy was asked for on neither side."""
    sides = {"base": base, "new": new}
    if not any(record.energy for record in sides.values()):
        return None
    for side, record in sides.items():
        if found := unfair(record):
            return EnergyRatio(reason=f"{side}: {found.text}: {found.reason}")
    if (base.target, base.cpu_info) != (new.target, new.cpu_info):
        return EnergyRatio(reason="they were metered on different machines")
    if apart := capped_apart(capped_at(base), capped_at(new)):
        return EnergyRatio(reason=apart)
    told = [{one.meter: one.joules for one in accounts(r) if one.joules} for r in sides.values()]
    shared = next((meter for meter in told[0] if meter in told[1]), None)
    if shared is None:
        return EnergyRatio(reason=_why_none(base, new, told))
    return _ratio(shared, told[0][shared], told[1][shared])


def _ratio(meter: str, base: Joules, new: Joules) -> EnergyRatio:
    return EnergyRatio(meter, new.value / base.value, new.low / base.high, new.high / base.low)


def _why_none(base: BenchRecord, new: BenchRecord, told: list[dict[str, Joules]]) -> str:
    if all(told):
        return f"different meters: {', '.join(told[0])} and {', '.join(told[1])}"
    for side, record, known in zip(("base", "new"), (base, new), told, strict=True):
        if not known:
            return f"{side}: {next((one.reason for one in accounts(record)), 'energy was not asked for')}"
    return "no meter"
