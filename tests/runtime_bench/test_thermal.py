"""Caps and temperatures come from the machine's files, and what is not known stays unknown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime_bench.environment import clock_cap, environment_of, hottest_c
from runtime_bench.measuring.measure import run_bench
from runtime_bench.records.bench_record import Environment
from runtime_bench.records.jsonl import record_from_json, record_to_json
from runtime_bench.records.notes import note_of
from runtime_bench.targets import Local
from runtime_bench.workload import BenchSettings

CPU = "/sys/devices/system/cpu/cpu{}/cpufreq/{}"
ZONE = "/sys/class/thermal/thermal_zone{}/{}"


def machine(cap_khz: int, millidegrees: int) -> Environment:
    """Two cores of 2 GHz, the second one capped, and a zone."""
    files = {
        CPU.format(0, "cpuinfo_max_freq"): "2000000\n",
        CPU.format(1, "cpuinfo_max_freq"): "2000000\n",
        CPU.format(0, "scaling_max_freq"): "2000000\n",
        CPU.format(1, "scaling_max_freq"): f"{cap_khz}\n",
        ZONE.format(0, "type"): "cpu\n",
        ZONE.format(0, "temp"): f"{millidegrees}\n",
    }
    return environment_of(files, cpus_usable=2, platform="Linux", versions={})


def test_the_worse_of_before_and_after() -> None:
    cool, hot = machine(2_000_000, 40_000), machine(1_200_000, 85_500)
    assert (clock_cap(cool), hottest_c(cool)) == (1.0, 40.0)
    assert clock_cap(cool, hot) == clock_cap(hot, cool) == 0.6
    assert hottest_c(cool, hot) == hottest_c(hot, cool) == 85.5
    nothing = environment_of({}, cpus_usable=2, platform="Linux", versions={})
    assert (clock_cap(nothing, nothing), hottest_c(nothing, nothing)) == (None, None)
    assert (clock_cap(nothing, hot), hottest_c(nothing, hot)) == (0.6, 85.5)
    assert clock_cap(replace(hot, core_max_khz=(1,))) is None


def test_capped_processes_are_marked(tiny_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    looks = iter([machine(2_000_000, 40_000)] * 4 + [machine(1_200_000, 80_000), machine(1_900_000, 70_000)])

    class Warming(Local):
        def environment(self) -> Environment:
            return next(looks)

    settings = BenchSettings(
        check_text=False, n_prompt=(), n_gen=(4,), ttft=(), load=False, repetitions=3, n_threads=(1,)
    )
    (record,) = run_bench([tiny_gguf()], replace(settings, spread_limit=1e9), target=Warming())
    # Two looks at the start, one before the first process, then one after each: the third was hot.
    assert record.clock_caps == (1.0, 0.6, 0.6)
    assert record.hottest_c == (40.0, 80.0, 80.0)
    assert (
        str(note_of(record)).partition("; ")[0]
        == "throttled: 2 of 3 processes ran with clocks capped by more than 15%, down to 60% of the highest"
    )
    assert record_from_json(record_to_json(record), where="here") == record


def test_a_small_cap_is_no_remark(make_record: Any) -> None:
    assert note_of(make_record(clock_caps=(0.9, None))) is None
