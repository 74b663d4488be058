"""Verdicts follow from the samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfsp.errors import InputError
from runtime_bench.measuring.text_check import check_text
from runtime_bench.presentation.comparison_table import comparison_table, format_comparison
from runtime_bench.records.compare import (
    Comparison,
    ComparisonSettings,
    Incomparable,
    bench_groups,
    compare,
    compare_records,
)
from runtime_bench.records.fairness import crowding
from runtime_bench.records.reported import Contention, EngineSettings
from runtime_bench.workload import Workload

NS = st.lists(st.integers(10**6, 10**9), min_size=5, max_size=8)
REUSE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
OPPOSITE = {
    "faster": "slower",
    "slower": "faster",
    "no difference": "no difference",
    "inconclusive": "inconclusive",
    "too noisy to tell": "too noisy to tell",
}


@REUSE
@given(NS)
def test_identical_samples_make_no_difference(make_record: Any, samples: list[int]) -> None:
    record = make_record(samples_ns=tuple(samples))
    found = compare_records(record, record)
    assert (found.ratio, found.low, found.high, found.verdict) == (1.0, 1.0, 1.0, "no difference")


@REUSE
@given(NS, st.sampled_from([2, 3, 10]))
def test_c_times_the_time_is_one_cth_of_the_speed(make_record: Any, samples: list[int], c: int) -> None:
    base = make_record(samples_ns=tuple(samples))
    new = make_record(samples_ns=tuple(c * s for s in samples))
    slower, faster = compare_records(base, new), compare_records(new, base)
    assert slower.ratio == pytest.approx(1 / c)
    assert slower.verdict == "slower"
    assert faster.ratio == pytest.approx(c)
    assert faster.verdict == "faster"


@REUSE
@given(
    st.lists(st.tuples(st.integers(10**6, 2 * 10**6), st.integers(10**6, 2 * 10**6)), min_size=5, max_size=8)
)
def test_exchanging_the_sides_turns_the_verdict_round(make_record: Any, pairs: list[tuple[int, int]]) -> None:
    left, right = (make_record(samples_ns=side) for side in zip(*pairs, strict=True))
    there, back = compare_records(left, right), compare_records(right, left)
    assert (back.ratio is None) == (there.ratio is None) == (there.verdict == "too noisy to tell")
    assert there.ratio is None or back.ratio == pytest.approx(1 / there.ratio)
    assert back.verdict == OPPOSITE[there.verdict]


def test_a_change_within_the_threshold_is_no_difference_and_across_it_inconclusive(make_record: Any) -> None:
    base = make_record(samples_ns=(1000, 1001, 1002, 1003, 1004))
    near = make_record(samples_ns=(1010, 1011, 1012, 1013, 1014))
    wide = make_record(samples_ns=(900, 950, 1000, 1050, 1200))
    assert compare_records(base, near, ComparisonSettings(threshold=0.03)).verdict == "no difference"
    assert compare_records(base, near, ComparisonSettings(threshold=0.005)).verdict == "slower"
    found = compare_records(base, wide)
    assert found.verdict == "inconclusive"
    assert "threshold" in str(found.reason)


def test_too_few_samples_and_failures_give_no_verdict(make_record: Any) -> None:
    base = make_record()
    few = make_record(samples_ns=(1, 1, 1, 1))
    assert compare_records(base, few).verdict == "inconclusive"
    assert "4 samples" in str(compare_records(base, few).reason)
    failed = make_record(status="failed", failure="timeout", samples_ns=())
    found = compare_records(base, failed)
    assert (found.verdict, found.ratio) == ("inconclusive", None)
    assert "timeout" in str(found.reason)


def test_only_rounds_of_one_session_are_paired(make_record: Any) -> None:
    base = make_record()
    assert compare_records(base, make_record()).paired
    assert not compare_records(base, make_record(session="another")).paired
    assert not compare_records(base, make_record(samples_ns=(10**9,) * 6)).paired


def test_drift_of_the_machine_cancels_in_pairs(make_record: Any) -> None:
    drift = (1.0, 1.3, 1.7, 2.2, 2.9, 3.7)
    base = make_record(samples_ns=tuple(int(1e6 * d) for d in drift))
    new = make_record(samples_ns=tuple(int(0.8e6 * d) for d in drift))
    apart = make_record(samples_ns=new.samples_ns, session="another")
    assert compare_records(base, new).verdict == "faster"
    assert compare_records(base, apart).verdict == "too noisy to tell"


@pytest.mark.parametrize(
    "change",
    [{"kind": "emulated"}, {"target": "ssh:board"}, {"engine": "torch"}, {"n_threads": 8}, {"n_ubatch": 64}],
)
def test_different_things_are_not_compared(make_record: Any, change: dict[str, Any]) -> None:
    found = compare_records(make_record(), make_record(**change))
    assert isinstance(found, Incomparable)
    assert next(iter(change)) in found.reason


def test_rows_need_one_partner_each(make_record: Any) -> None:
    tg, pp = make_record(), make_record(Workload("pp", n_prompt=512))
    found, alone = compare([tg, pp], [tg])
    assert isinstance(found, Comparison)
    assert isinstance(alone, Incomparable)
    assert (alone.base, alone.new) == (pp.model_filename, None)
    assert "row without partner: pp512 with 2 threads" in alone.reason
    elsewhere = make_record(target="ssh:board", session="another")
    rows = [(row.base, row.new) for row in compare([tg], [tg, pp, elsewhere])]
    assert rows == [
        (tg.model_filename, tg.model_filename),
        (None, pp.model_filename),
        (None, tg.model_filename),
    ]
    with pytest.raises(InputError, match="several rows"):
        compare([tg, tg], [tg])
    with pytest.raises(InputError, match="nothing to compare"):
        compare([], [tg])
    assert [c.test for c in compare([tg, pp], [pp, tg])] == ["tg128", "pp512"]


def test_memory_and_size_ratios(make_record: Any) -> None:
    base = make_record(peak_rss_samples_bytes=(1000,), file_size_bytes=800)
    new = make_record(peak_rss_samples_bytes=(500,), file_size_bytes=200)
    found = compare_records(base, new)
    assert (found.peak_rss_ratio, found.file_size_ratio) == (0.5, 0.25)
    assert compare_records(base, make_record(peak_rss_samples_bytes=())).peak_rss_ratio is None


@pytest.mark.parametrize("setting", [{"threshold": -0.1}, {"threshold": 1.0}, {"confidence": 1.0}])
def test_settings_out_of_range(make_record: Any, setting: dict[str, float]) -> None:
    with pytest.raises(InputError, match="out of range"):
        compare_records(make_record(), make_record(), ComparisonSettings(**setting))


def test_a_verdict_needs_as_many_processes_as_samples(make_record: Any) -> None:
    samples = (1000,) * 10
    one = {"samples_ns": samples, "sequence": (0,) * 10, "samples_per_process": 10}
    found = compare_records(make_record(**one), make_record(**one))
    assert found.verdict == "inconclusive"
    assert "1 processes" in str(found.reason)
    five = {"samples_ns": samples, "samples_per_process": 2}
    base = make_record(sequence=(0, 0, 2, 2, 4, 4, 6, 6, 8, 8), **five)
    new = make_record(sequence=(1, 1, 3, 3, 5, 5, 7, 7, 9, 9), **five)
    assert base.rounds == new.rounds == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)
    assert compare_records(base, new).paired
    assert compare_records(base, new).verdict == "no difference"


def test_the_speed_of_a_file_that_writes_nonsense_is_void(make_record: Any) -> None:
    fast = make_record(samples_ns=(10**8,) * 5, degenerate="loop", text_sample="and and and")
    found = compare_records(make_record(), fast)
    assert found.verdict == "inconclusive"
    assert "degenerate text (loop)" in str(found.reason)


def test_a_crowded_machine_is_seen_through_by_processor_time(make_record: Any) -> None:
    wall = (300, 2000, 700, 5000, 900, 1200)
    base = make_record(samples_ns=wall, cpu_samples_ns=(100, 101, 102, 103, 104, 105), n_threads=1)
    slow = make_record(samples_ns=wall[::-1], cpu_samples_ns=(115, 116, 117, 118, 119, 120), n_threads=1)
    found = compare_records(base, slow)
    assert (found.basis, found.verdict) == ("cpu", "slower")
    assert (found.base_median_ns, found.new_median_ns) == (102.5, 117.5)
    assert "processor time" in format_comparison([found])
    for change in ({"cpu_samples_ns": ()}, {"n_threads": 2}):
        pair = [replace(record, **change) for record in (base, slow)]
        assert compare_records(*pair).basis == "wall"
        assert compare_records(*pair).verdict == "too noisy to tell"
        assert compare_records(*pair).ratio is None
    quiet = [replace(record, cpu_samples_ns=record.samples_ns) for record in (base, slow)]
    assert compare_records(*quiet).basis == "wall"


STEADY = (1000, 1001, 1002, 1003, 1004, 1005)


def busy(make_record: Any, others: float, stolen: float = 0.0, factor: int = 1, **fields: Any) -> Any:
    """A record with steady samples, of two threads on two cores that others used as well."""
    contention = (Contention(others, stolen),) * len(STEADY)
    record = make_record(samples_ns=tuple(factor * ns for ns in STEADY), contention=contention, **fields)
    return replace(record, environment=replace(record.environment, cpus_usable=2))


@pytest.mark.parametrize("side", [0, 1])
def test_several_threads_that_others_kept_from_the_cores_give_no_ratio(make_record: Any, side: int) -> None:
    records = [busy(make_record, 0.0), busy(make_record, 0.0, factor=25)]
    assert compare_records(*records).verdict == "slower"
    records[side] = busy(make_record, 1.6, factor=25 if side else 1)
    found = compare_records(*records)
    assert (found.verdict, found.ratio, found.low, found.high) == ("too noisy to tell", None, None, None)
    assert found.reason == f"{('base', 'new')[side]}: other programs took 80% of the time of its threads"
    table = format_comparison([found])
    assert "too noisy to tell" in table
    assert "slower" not in table
    assert "25.0" not in table


def test_processor_time_says_nothing_where_the_host_takes_the_cores(make_record: Any) -> None:
    fields = {"cpu_samples_ns": STEADY, "n_threads": 1}
    assert compare_records(*[busy(make_record, 1.9, **fields)] * 2).verdict == "no difference"
    found = compare_records(*[busy(make_record, 0.0, stolen=0.3, **fields)] * 2)
    assert (found.verdict, found.ratio) == ("too noisy to tell", None)
    assert "the host of this machine took 30%" in str(found.reason)


def test_threads_that_wait_for_each_other_on_an_idle_machine_are_not_crowded(make_record: Any) -> None:
    waited = tuple(ns // 2 for ns in STEADY)
    assert crowding(busy(make_record, 0.05, waited_samples_ns=waited)) is None
    assert "25%" in str(crowding(busy(make_record, 1.0, waited_samples_ns=waited)))
    assert crowding(busy(make_record, 1.0, waited_samples_ns=(0,) * 6)) is None
    assert crowding(make_record(samples_ns=STEADY, waited_samples_ns=waited)) is not None
    assert crowding(busy(make_record, 1.0, n_threads=64, waited_samples_ns=waited)) is None
    assert crowding(make_record(samples_ns=STEADY, contention=(None,) * 6)) is None


def test_an_interval_that_reaches_everywhere_is_no_ratio(make_record: Any) -> None:
    base = make_record(samples_ns=(1000, 1100, 900, 1000, 1050, 950))
    for samples in ((1, 2, 90_000, 3, 80_000, 2), (26_000, 900, 25_000, 1300, 27_000, 24_000)):
        found = compare_records(base, make_record(samples_ns=samples, session="another"))
        assert (found.verdict, found.ratio) == ("too noisy to tell", None)
        assert "the rounds differ too much" in str(found.reason)


@REUSE
@given(NS, NS, st.booleans(), st.sampled_from(["tg", "ttft"]))
def test_the_ratio_is_the_quotient_of_the_speeds_beside_it(
    make_record: Any, base: list[int], new: list[int], crowded: bool, kind: str
) -> None:
    workload = Workload("tg", n_gen=128) if kind == "tg" else Workload("ttft", n_prompt=128, n_gen=1)
    sides = []
    for ns in (base, new):
        cpu = tuple(n // (3 if crowded else 1) for n in ns)
        sides.append(make_record(workload, samples_ns=tuple(ns), cpu_samples_ns=cpu, n_threads=1))
    found = compare_records(*sides)
    assert found.basis == ("cpu" if crowded else "wall")
    row = comparison_table([found]).objects()[0]
    if row["speed ratio"] is None:
        return
    (left, unit), (right, _) = (row[name].split(" ") for name in ("base speed", "new speed"))
    quotient = float(right) / float(left) if unit == "t/s" else float(left) / float(right)
    assert float(row["speed ratio"]) == pytest.approx(quotient, rel=0.012, abs=0.0006)


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


Q8 = EngineSettings("q8_0", flash_attention=True)


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=32)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="the gguf extra is not installed")
def test_the_text_that_is_checked_is_written_with_the_same_cache(
    model: Path, tiny_gguf: Callable[..., Path]
) -> None:
    assert check_text(model, 120, "q4_0").texts
    assert "block size 32" in str(check_text(tiny_gguf(), 120, "q4_0").problem)


def test_unlike_caches_are_held_apart(make_record: Any) -> None:
    floats, older = make_record(engine_settings=EngineSettings("f16")), make_record()
    few = make_record(engine_settings=Q8)
    for other in (floats, older):
        for found in (compare_records(other, few), *compare([other], [few])):
            assert isinstance(found, Incomparable)
            assert "quantized_cache None and 'q8_0'" in found.reason
    assert compare_records(older, floats).verdict == "no difference"
    assert compare_records(few, few).verdict == "no difference"


def test_rows_of_several_caches_find_their_own_partners(make_record: Any) -> None:
    base = [make_record(), make_record(engine_settings=Q8, samples_ns=(2 * 10**9,) * 5)]
    new = [replace(record, model_filename="new.gguf") for record in reversed(base)]
    rows = compare(base, new)
    assert [(row.quantized_cache, row.verdict) for row in rows] == [
        (None, "no difference"),
        ("q8_0", "no difference"),
    ]
    header, _, *lines = format_comparison(rows).splitlines()
    assert "cache" in header
    assert ["floats" in lines[0], "q8_0" in lines[1]] == [True, True]
    assert [group.title for group in bench_groups(base)] == [
        "Measured on local",
        "Measured on local with a cache of q8_0",
    ]
