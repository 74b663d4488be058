"""First, cold and warm runs by name: measured apart, and never compared with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.settings import as_read
from runtime_bench.measuring.matrix import run_matrix
from runtime_bench.measuring.measure import run_bench
from runtime_bench.measuring.rows import shares
from runtime_bench.presentation.record_table import format_table
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Incomparable, compare, compare_records
from runtime_bench.records.fairness import crowding
from runtime_bench.targets import LOCAL, Local
from runtime_bench.targets.table import Unreachable
from runtime_bench.targets.transport import StoppedError
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import READS, BenchSettings, Workload, workloads_of

SETTINGS = BenchSettings(
    check_text=False, n_prompt=(), n_gen=(4,), ttft=(16,), start=(16,), repetitions=4, n_threads=(1,), spread_limit=1e9
)  # fmt: skip


def test_names() -> None:
    names = [row.test for row in workloads_of(replace(SETTINGS, regimes=("fresh", "cold", "warm")))]
    assert names[:4] == ["load", "tg4", "ttft16", "start16"]
    assert names[4:8] == ["load @ cold", "tg4 @ cold", "ttft16 @ cold", "start16 @ cold"]
    # A process opens its file but once, and is warm afterwards.
    assert names[8:] == ["tg4 @ warm", "ttft16 @ warm"]
    assert Workload("tg", n_gen=8, n_depth=64, regime="first").test == "tg8 @ d64 @ first"
    with pytest.raises(InputError, match="unknown regime"):
        Workload("tg", n_gen=8, regime="lukewarm")


def test_each_is_measured_as_it_says(tiny_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    settings = replace(SETTINGS, n_gen=(), load=False, regimes=("fresh", "cold", "warm"))
    records = {record.test: record for record in run_bench([tiny_gguf()], settings)}
    assert [record.failure for record in records.values()] == [None] * 5
    fresh, start, cold = records["ttft16"], records["start16"], records["ttft16 @ cold"]
    warm = records["ttft16 @ warm"]
    assert (fresh.warmup, start.warmup, cold.warmup, warm.warmup) == (True, False, False, True)
    assert (fresh.page_cache, start.page_cache, cold.page_cache) == ("as_found", "warm", "cold")
    assert (len(set(fresh.rounds)), len(set(start.rounds)), len(set(cold.rounds))) == (4, 4, 4)
    assert warm.rounds == (0, 0, 0, 1, 1, 1)
    # With the opening, and the processor's clocks of none of it.
    assert all(
        whole > opening for whole, opening in zip(start.samples_ns, start.load_samples_ns, strict=True)
    )
    assert (start.cpu_samples_ns, start.held_samples_ns) == ((), ())
    table = format_table(list(records.values()))
    assert "start16 (warm)" in table
    assert "ttft16 @ cold (" in table


def test_regimes_are_held_apart(make_record: Any) -> None:
    cold = make_record(Workload("tg", n_gen=128, regime="cold"), regime="cold")
    found = compare_records(make_record(), cold)
    assert isinstance(found, Incomparable)
    assert "regime 'fresh' and 'cold'" in found.reason
    _, alone = compare([make_record(), cold], [make_record()])
    assert isinstance(alone, Incomparable)
    assert "row without partner: tg128 @ cold with 2 threads" in alone.reason
    assert compare([cold], [cold])[0].test == "tg128 @ cold"


def test_cold_runs_that_were_warm_are_not_judged(make_record: Any) -> None:
    cold = {"regime": "cold", "page_cache": "cold", "page_cache_shares": (0.0,) * 5}
    workload = Workload("tg", n_gen=128, regime="cold")
    record = make_record(workload, **cold)
    assert compare_records(record, record).verdict == "no difference"
    found = compare_records(record, make_record(workload, **(cold | {"page_cache_shares": (1.0,) * 5})))
    assert (found.verdict, found.reason) == ("inconclusive", "new was to be loaded cold, and was warm")


def test_waiting_for_the_disk_is_no_crowd(make_record: Any) -> None:
    slow = {"n_threads": 1, "cpu_samples_ns": (5 * 10**8,) * 5}
    assert crowding(make_record(**slow)) is not None
    assert crowding(make_record(**slow, held_samples_ns=(None,) * 5)) is None


def test_every_process_of_a_warm_row_takes_three_samples() -> None:
    warm, fresh = Workload("tg", n_gen=4, regime="warm"), Workload("tg", n_gen=4)
    for asked, taken in ((1, [3]), (5, [3, 3]), (6, [3, 3])):
        assert shares(replace(SETTINGS, repetitions=asked), warm) == taken
    assert shares(replace(SETTINGS, repetitions=5, samples_per_process=4), warm) == [4, 4]
    assert shares(replace(SETTINGS, repetitions=5, samples_per_process=4), fresh) == [4, 1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"regimes": ("warm",), "warmup": False}, "--regime: nothing is warmed up"),
        ({"n_gen": (0,), "sustained_s": 600.0}, "--sustained: nothing is generated"),
        ({"regimes": ("warm",), "start": (8,)}, "--start: the file is open already"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        workloads_of(replace(SETTINGS, **changes))


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"unplugged": True}, "--unplugged has no effect without a time for --wait-nominal"),
        ({"nominal_c": 30.0}, "--nominal-c has no effect without a time for --wait-nominal"),
    ],
)
def test_what_has_no_effect_is_warned_of(changes: dict[str, Any], warning: str) -> None:
    read, warnings = as_read(replace(SETTINGS, **changes), READS)
    (said,) = warnings
    assert said.startswith(warning)
    assert read == replace(SETTINGS, **{name: value for name, value in changes.items() if name not in READS})
    assert as_read(replace(SETTINGS, unplugged=True, wait_nominal_s=5.0), READS)[1] == ()


class Elsewhere(Local):
    """A place that files are pushed to, where nothing may run."""

    name, pushes = "elsewhere", True

    def forget(self, path: Path) -> None:
        raise StoppedError("stopped")

    def run(self, request: WorkerRequest, timeout_s: float) -> WorkerResult:
        raise AssertionError("measured")


class Earlier:
    """A target that was written when `Target` had no more than this."""

    name, kind, memory_limit_bytes = "earlier", "measured", None
    default_engine, require, environment, run = (
        LOCAL.default_engine,
        LOCAL.require,
        LOCAL.environment,
        LOCAL.run,
    )


def test_what_one_of_several_targets_cannot_is_refused_before_any_of_them_measures(
    tiny_gguf: Callable[..., Path],
) -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(InputError, match="no file is pushed to local"):
        run_matrix([tiny_gguf()], replace(SETTINGS, regimes=("first",)), [Elsewhere(), LOCAL])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"regimes": ("first",)}, "no file is pushed to earlier"),
        ({"wait_nominal_s": 1.0}, "nobody can look at earlier"),
    ],
)
def test_targets_of_earlier_versions_are_told_what_they_lack(
    tiny_gguf: Callable[..., Path], changes: dict[str, Any], match: str
) -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(InputError, match=match):
        run_bench([tiny_gguf()], replace(SETTINGS, **changes), target=Earlier())  # type: ignore[arg-type]


def test_a_run_that_is_stopped_while_a_file_is_removed_leaves_no_row(tiny_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    kept: list[BenchRecord] = []
    settings = replace(SETTINGS, regimes=("first",))
    with pytest.raises(StoppedError):
        run_bench([tiny_gguf()], settings, target=Elsewhere(), on_record=kept.append)
    assert kept == []


def test_a_place_that_cannot_be_opened_says_why_in_its_row(tiny_gguf: Callable[..., Path]) -> None:
    pytest.importorskip("llama_cpp")
    settings = replace(SETTINGS, regimes=("first",), ttft=(), start=(), load=False)
    (record,) = run_bench([tiny_gguf()], settings, target=Unreachable("adb:1", "no such device"))
    assert record.failure == "no such device"
