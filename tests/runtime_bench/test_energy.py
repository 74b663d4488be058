"""Joules a token: from readings of meters to records and tables."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoneready.report.report import record_table as report_table
from runtime_bench.conditions import script
from runtime_bench.conditions.looks import energy_of
from runtime_bench.conditions.script import FACT, METERS, READING, UNREADABLE, WATCH
from runtime_bench.measuring.measure import run_bench
from runtime_bench.presentation.comparison_table import format_comparison
from runtime_bench.presentation.record_table import format_table, record_table
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Comparison, bench_groups, compare_records
from runtime_bench.records.fairness import energy, note_of
from runtime_bench.records.jsonl import record_from_json, record_to_json
from runtime_bench.records.reported import Conditions, Joules, Metered, ProcessEnergy
from runtime_bench.workload import BenchSettings

RAPL, SUPPLY = "/sys/class/powercap/intel-rapl", "/sys/class/power_supply"
SEEN = Conditions((0.0,), ((0.0, 1.0),), charging=(False,))
TIMES = [100 + 0.1 * i for i in range(121)]


def used(begin_s: float, end_s: float) -> float:
    """Joules of a power that rises and falls around 8 W."""
    return 8.0 * (end_s - begin_s) - 2.0 * (math.cos(end_s) - math.cos(begin_s))


def report(meters: dict[str, Callable[[float], float]], facts: dict[str, str], times: Any = TIMES) -> str:
    """What the script writes of meters: path -> its value at a time."""
    lines = [f"{METERS} {' '.join(meters)}", *(f"{FACT} {path} {text}" for path, text in facts.items())]
    for at in times:
        values = " ".join(str(math.floor(shows(at))) for shows in meters.values())
        lines.append(f"{READING} {at:.4f} {at:.4f} {values}")
    return "\n".join(lines) + "\n"


def counter(wraps: int = 262_143_328_850, every_s: float = 0.0, begins: int = 0) -> Callable[[float], float]:
    """Microjoules, brought up to date every so often."""
    return lambda at: (begins + used(0.0, at - at % every_s if every_s else at) * 1e6) % wraps


def told(text: str, begin: float = 103.0, end: float = 109.0, seen: Conditions = SEEN) -> ProcessEnergy:
    return energy_of(text, [(int(begin * 1e9), int(end * 1e9))], seen)


def packages(*wraps: int, **changes: Any) -> str:
    meters = {f"{RAPL}:{i}/energy_uj": counter(one, **changes) for i, one in enumerate(wraps)}
    facts = {f"{RAPL}:{i}/name": f"package-{i}" for i in range(len(wraps))}
    return report(
        meters, facts | {f"{RAPL}:{i}/max_energy_range_uj": str(one) for i, one in enumerate(wraps)}
    )


def battery(shows: Callable[[float], float], file: str = "current_now", **more: str) -> str:
    facts = {f"{SUPPLY}/battery/type": "Battery"} | {
        f"{SUPPLY}/{name}/type": kind for name, kind in more.items()
    }
    meters = {f"{SUPPLY}/{name}/{file}": shows for name in ("battery", *more)}
    return report(meters | {f"{SUPPLY}/battery/voltage_now": lambda at: 4e6}, facts)


def test_packages_of_all_sockets_are_one_counter() -> None:
    # The second one wraps within the samples; 856 J until the first reading.
    (found,) = told(packages(262_143_328_850, 860_000_000)).meters
    assert (found.method, found.domain, found.seconds) == ("RAPL counter", "package", 6.0)
    assert found.joules is not None
    assert found.joules.low <= 2 * used(103.0, 109.0) <= found.joules.high
    assert found.joules.value == pytest.approx(2 * used(103.0, 109.0), rel=0.01)
    assert found.joules.error < 0.06 * found.joules.value


def test_a_battery_shows_power_or_current_and_voltage() -> None:
    def watts(at: float) -> float:
        return 8.0 + 2.0 * math.sin(at)

    for text, method in (
        (battery(lambda at: -watts(at) / 4 * 1e6), "battery current x voltage"),
        (battery(lambda at: watts(at) * 1e6, "power_now", mouse="Device"), "battery power"),
    ):
        (found,) = told(text).meters
        assert (found.method, found.domain) == (method, "whole device, at battery")
        assert found.joules is not None
        assert found.joules.low <= used(103.0, 109.0) <= found.joules.high
        assert found.joules.error < 0.05 * found.joules.value


@pytest.mark.parametrize(
    ("text", "seen", "why"),
    [
        (packages(262_143_328_850, every_s=20.0), SEEN, "its reading hardly changed"),
        (packages(50_000_000), SEEN, "it may have wrapped more than once"),
        (report({f"{RAPL}:0/energy_uj": lambda at: 9e12 * (at > 105) + at}, {f"{RAPL}:0/name": "package-0"}),
         SEEN, "it jumped by 9e+06 J"),
        (packages(262_143_328_850, every_s=4.0), SEEN, "before the first sample and after the last one"),
        (battery(lambda at: -2e6 - at), replace(SEEN, charging=(True,)), "there was external power"),
        (battery(lambda at: -2e6 - at), replace(SEEN, charging=()), "is unknown: no reading"),
        (report({f"{SUPPLY}/BAT{i}/power_now": lambda at: 2e6 + at for i in range(2)},
                {f"{SUPPLY}/BAT{i}/type": "Battery" for i in range(2)}), SEEN, "several batteries"),
        (battery(lambda at: 2e6 * math.sin(at)), SEEN, "its sign changed"),
        (battery(lambda at: -2e3 - at), SEEN, "its unit is another one"),
        (battery(lambda at: -2e9 - at), SEEN, "W, which no such device takes"),
    ],
)  # fmt: skip
def test_a_meter_that_cannot_be_used_says_why(text: str, seen: Conditions, why: str) -> None:
    found = told(text, seen=seen).meters[0]
    assert found.joules is None
    assert why in str(found.problem)


def test_what_is_not_there_or_may_not_be_read_says_so() -> None:
    assert told("").hidden == "neither RAPL nor a battery meters energy"
    assert told(f"{UNREADABLE} {RAPL}:0/energy_uj\n").hidden == (
        f"{RAPL}:0/energy_uj may not be read: most systems allow only root"
    )
    unknown = Conditions((0.0,), charging=(False,))
    assert (
        told(packages(10**12), seen=unknown).hidden == "the times of samples are unknown, or by another clock"
    )


@given(
    every_s=st.sampled_from((0.0, 0.25, 0.9)),
    gaps=st.lists(st.integers(10, 60).map(lambda n: n / 100), min_size=30, max_size=60),
    data=st.data(),
)
def test_the_truth_lies_within_the_bounds(every_s: float, gaps: list[float], data: st.DataObject) -> None:
    times = [100.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    meters = {f"{RAPL}:0/energy_uj": counter(every_s=every_s)}
    text = report(meters, {f"{RAPL}:0/name": "package-0"}, times)
    ends = data.draw(st.lists(st.floats(times[0] + 1, times[-1] - 1), min_size=2, max_size=6, unique=True))
    ends = sorted(ends)[: len(ends) // 2 * 2]
    spans = [(int(begin * 1e9), int(end * 1e9)) for begin, end in zip(ends[::2], ends[1::2], strict=True)]
    (found,) = energy_of(text, spans, SEEN).meters
    if found.joules is not None:
        truth = sum(used(begin / 1e9, end / 1e9) for begin, end in spans)
        assert found.joules.low - 1e-3 <= truth <= found.joules.high + 1e-3


def test_a_benchmark_reads_the_meters_of_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gguf: Callable[..., Path]
) -> None:
    pytest.importorskip("llama_cpp")
    moved = WATCH.replace("\nbase=  #", f"\nbase={tmp_path}  #", 1)
    monkeypatch.setattr(script, "SHELL", ("sh", "-c", moved, "phoneready"))
    zone = tmp_path / f"{RAPL[1:]}:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    over = threading.Event()

    def count() -> None:
        while not over.wait(0.01):
            part = zone / ".part"
            part.write_text(f"{int(8e6 * time.monotonic())}\n")
            part.replace(zone / "energy_uj")

    thread = threading.Thread(target=count)
    thread.start()
    settings = BenchSettings(
        check_text=False, n_prompt=(), n_gen=(400,), ttft=(), n_threads=(1,), repetitions=1,
        regimes=("sustained",), sustained_s=4.0, energy=True, spread_limit=1e9,
    )  # fmt: skip
    try:
        (record,) = run_bench([tiny_gguf(hidden_size=256, head_dim=64)], settings)
    finally:
        over.set()
        thread.join()
    found = energy(record)
    assert found is not None
    assert found.meter == "RAPL counter, package"
    if found.joules is not None:  # else the machine had no time to look
        watts = found.joules.value * record.n_tokens * len(record.samples_ns) * 1e9 / sum(record.samples_ns)
        assert watts == pytest.approx(8.0, rel=0.2)
    text = json.dumps(record_to_json(record))
    assert record_from_json(json.loads(text), where="here") == record
    (plain,) = run_bench([Path(record.model_filename)], replace(settings, energy=False, sustained_s=0.1))
    assert (plain.energy, energy(plain)) == ((), None)
    assert "J/token" not in format_table([plain])


# ---- Rows -----------------------------------------------------------------------------------------------------------

PACKAGE = Metered("RAPL counter", "package", 10.0, Joules(98, 100, 102))
BATTERY = replace(PACKAGE, method="battery power", domain="whole device, at BAT0")


def metered(make_record: Any, *meters: Metered, **fields: Any) -> BenchRecord:
    """A row of 128 tokens a sample, two processes of a sample each."""
    given = {"samples_ns": (10**10, 10**10), "sequence": (0, 1), "energy": (ProcessEnergy(meters),) * 2}
    record: BenchRecord = make_record(**(given | fields))
    return record


def test_all_repetitions_make_one_account_of_the_first_meter_that_works(make_record: Any) -> None:
    void = replace(BATTERY, joules=None, problem="it jumped")
    found = energy(metered(make_record, void, PACKAGE))
    assert found is not None
    assert found.meter == "RAPL counter, package"
    assert found.joules == Joules(196 / 256, 200 / 256, 204 / 256)
    assert found.of_processes == (100 / 128, 100 / 128)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"status": "failed", "failure": "gone"}, "it failed"),
        ({"kind": "emulated"}, "an emulator's energy says nothing"),
        ({"degenerate": "empty"}, "what it writes is degenerate (empty)"),
        ({"energy": (None, None)}, "no meter was read"),
        (
            {"energy": (ProcessEnergy((PACKAGE,)), ProcessEnergy((BATTERY,)))},
            "process 2 of 2 was not metered so",
        ),
        ({"samples_ns": (), "sequence": ()}, "tg is no rate of tokens"),
        ({"energy": (ProcessEnergy(hidden="only root may"),) * 2}, "only root may"),
        (
            {"energy": (ProcessEnergy((replace(PACKAGE, joules=Joules(70, 100, 130)),)),) * 2},
            "known to ± 30% only, and ± 10% is wanted: the samples are too short for the meter; about 384 tokens "
            "each would do",
        ),
    ],
)
def test_rows_without_joules_say_why(make_record: Any, fields: dict[str, Any], why: str) -> None:
    found = energy(metered(make_record, PACKAGE, **fields))
    assert found is not None
    assert (found.joules, found.reason) == (None, why)


def test_tables_remarks_and_the_report_show_joules_or_the_reason(make_record: Any) -> None:
    good = metered(make_record, PACKAGE)
    failed = metered(make_record, replace(PACKAGE, joules=None, problem="it jumped by 5 J"), n_threads=1)
    row = record_table([good]).objects()[0]
    assert (row["J/token"], row["energy of"]) == ("0.781 (0.766 to 0.797)", "RAPL counter, package")
    assert "no joules per token (RAPL counter, package): it jumped by 5 J" in str(note_of(failed))
    (group,) = bench_groups([good, failed])
    first, second = report_table(group).objects()
    assert (first["J/token"], first["energy of"]) == ("0.781 (0.766 to 0.797)", "RAPL counter, package")
    assert (second["J/token"], second["energy of"]) == ("-", "it jumped by 5 J")


def test_only_the_same_meter_of_the_same_machine_is_compared(make_record: Any) -> None:
    base = metered(make_record, PACKAGE)
    less = replace(PACKAGE, joules=Joules(48, 50, 52))
    new = metered(make_record, less, model_filename="models/pruned.gguf")
    compared = compare_records(base, new)
    assert isinstance(compared, Comparison)
    found = compared.energy
    assert found is not None
    assert (found.meter, found.ratio) == ("RAPL counter, package", 0.5)
    assert (found.low, found.high) == (pytest.approx(48 / 102), pytest.approx(52 / 98))
    text = format_comparison([compared])
    assert "0.471 to 0.531" in text
    assert "all that each meter told: RAPL counter, package" in text

    def why(**fields: Any) -> str:
        other = compare_records(base, replace(new, **fields))
        assert isinstance(other, Comparison)
        assert other.energy is not None
        assert other.energy.ratio is None
        return str(other.energy.reason)

    elsewhere = ProcessEnergy((replace(BATTERY, joules=less.joules),))
    assert why(energy=(elsewhere,) * 2).startswith(
        "different meters: RAPL counter, package and battery power"
    )
    assert why(energy=()) == "new: energy was not asked for"
    assert why(energy=(ProcessEnergy(hidden="only root may"),) * 2) == "new: only root may"
    assert why(conditions=tuple(Conditions((0.0,), caps=(cap,)) for cap in (1.0, 0.5))).startswith(
        "new: throttled"
    )
