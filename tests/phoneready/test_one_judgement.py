"""A release says one thing of a row: its report and its budgets ask the same judgement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from phoneready.figures.figures import DENSE, PRUNED, BudgetConfig, Figure
from phoneready.figures.gate import judge
from phoneready.release.results import benchmark_figures
from phoneready.report.report import ReportInput, render_page, verdict_table
from phoneready.settings.release import parse_config
from runtime_bench.measuring.measure import with_more
from runtime_bench.presentation.comparison_table import format_comparison
from runtime_bench.records.bench_record import BenchRecord, MeasuredOn
from runtime_bench.records.compare import Comparison, against_the_first, compare_records
from runtime_bench.records.reported import Conditions
from runtime_bench.workload import Workload

CONFIG = parse_config('[model]\nreference = "m"\n[bench]\nn_threads = [1]\n', where="the test's")
ITEMS = {"dense.gguf": (DENSE, "Q4_0"), "pruned.gguf": (PRUNED, "Q4_0")}
TG, TTFT = Workload("tg", n_gen=64), Workload("ttft", n_prompt=128, n_gen=1)
WALL = (300, 420, 290, 510, 310, 388)
BUSY = (300, 2000, 700, 5000, 900, 1200)


@pytest.fixture
def pair(make_record: Any) -> Callable[..., tuple[BenchRecord, BenchRecord]]:
    """`pair(workload, times, **fields)`: a dense file's row and a pruned one's, which is faster by a tenth."""

    def make(workload: Workload, times: tuple[int, ...], **fields: Any) -> tuple[BenchRecord, BenchRecord]:
        def row(name: str, factor: float, **more: Any) -> BenchRecord:
            samples = tuple(int(10**6 * factor * ns) for ns in times)
            cpu = tuple(int(10**6 * factor * (100 + ns / 1000)) for ns in times)
            values = {"samples_ns": samples, "cpu_samples_ns": cpu, "n_threads": 1, "model_filename": name}
            record: BenchRecord = make_record(workload, **(values | fields | more))
            return record

        return row("dense.gguf", 1.1), row("pruned.gguf", 1.0)

    return make


def figures_of(*records: BenchRecord) -> dict[str, Figure]:
    found = benchmark_figures(CONFIG, "local", records, ITEMS)
    return {figure.role: figure for figure in found if figure.key.metric == records[0].test}


@pytest.mark.parametrize("workload", [TG, TTFT], ids=["tg", "ttft"])
@pytest.mark.parametrize(
    ("times", "fields", "basis"),
    [
        (WALL, {"cpu_samples_ns": ()}, "wall"),
        (BUSY, {}, "cpu"),
        (BUSY, {"n_threads": 2}, "wall"),
        (WALL[:4], {"cpu_samples_ns": ()}, "wall"),
    ],
    ids=["idle", "crowded, one thread", "crowded, two threads", "too few"],
)
def test_a_budget_is_held_against_the_comparison_that_the_report_prints(
    pair: Any, workload: Workload, times: tuple[int, ...], fields: dict[str, Any], basis: str
) -> None:
    dense, pruned = pair(workload, times, **fields)
    found, figures = compare_records(dense, pruned), figures_of(dense, pruned)
    assert isinstance(found, Comparison)
    limit = {"at_least": 1.05} if workload is TG else {"at_most": 1 / 1.05}
    budget = BudgetConfig(metric=workload.test, relative_to="dense", **limit)
    verdict = judge(budget, figures[PRUNED], figures[DENSE])
    assert found.basis == basis
    if found.reason is not None:
        assert (verdict.outcome, verdict.value) == ("inconclusive", None)
        assert found.reason.removeprefix("base").removeprefix(":") in verdict.reason
        return
    ends = [found.ratio, found.low, found.high]
    if workload is TTFT:
        ends = [1 / found.ratio, 1 / found.high, 1 / found.low]  # type: ignore[operator]
    assert [verdict.value, verdict.low, verdict.high] == pytest.approx(ends, rel=1e-12)
    if workload is TG:
        absolute = judge(BudgetConfig(metric=TG.test, at_least=1.0), figures[PRUNED], None)
        assert figures[PRUNED].value == pruned.median_ts == pytest.approx(absolute.value, rel=1e-12)
    assert (found.verdict, verdict.outcome) == ("faster", "pass")


def test_a_gpu_that_fell_back_ends_no_report(make_report_input: Callable[..., ReportInput]) -> None:
    report = make_report_input("Tiny")
    slow = {record.file for record in report.figures.pruned}
    fell_back = tuple(
        replace(r, backends="CPU (not gpu)" if r.model_filename in slow else "CUDA0")
        for r in report.figures.bench
    )
    figures = replace(report.figures, bench=fell_back)
    text = verdict_table(figures, *figures.pairs[0])
    assert "backends 'CUDA0' and 'CPU (not gpu)'" in text
    assert "times as fast" not in text
    page = render_page(replace(report, figures=figures))
    assert "not comparable" in page
    assert "not comparable" in format_comparison(against_the_first(list(fell_back)))


def test_rounds_that_are_added_follow_their_own_and_stay_pairs(pair: Any) -> None:
    first = [replace(r, sequence=tuple(range(n, 12, 2))) for n, r in enumerate(pair(TG, WALL))]
    more = [replace(r, session="another", sequence=(n, n + 2)) for n, r in enumerate(pair(TG, WALL[:2]))]
    peaks = {"peak_rss_samples_bytes": (5, 6)}
    dense, pruned = (with_more(a, replace(b, **peaks), 12) for a, b in zip(first, more, strict=True))
    assert dense.sequence == (0, 2, 4, 6, 8, 10, 12, 14)
    assert pruned.sequence == (1, 3, 5, 7, 9, 11, 13, 15)
    assert dense.rounds == pruned.rounds == tuple(range(8))
    assert len(dense.cpu_samples_ns) == len(dense.samples_ns) == 8
    assert dense.peak_rss_samples_bytes == (), "of the first processes there are fewer peaks"
    found = compare_records(dense, pruned)
    assert isinstance(found, Comparison)
    assert (found.paired, found.ratio) == (True, pytest.approx(1.1))
    unknown = with_more(first[0], replace(more[0], cpu_samples_ns=()), 12)
    assert (len(unknown.samples_ns), unknown.cpu_samples_ns) == (8, ())


def test_a_row_that_is_measured_on_is_judged_surer_by_report_and_budget(pair: Any) -> None:
    sides = [replace(r, measured_on=MeasuredOn(5, 31.0, True)) for r in pair(TG, WALL * 2, cpu_samples_ns=())]
    found, figures = compare_records(*sides), figures_of(*sides)
    once = compare_records(*(replace(r, measured_on=None) for r in sides))
    assert isinstance(found, Comparison)
    assert isinstance(once, Comparison)
    assert (once.confidence, found.confidence) == (0.95, pytest.approx(0.99))
    budget = BudgetConfig(metric=TG.test, relative_to="dense", at_least=found.ratio)
    verdict = judge(budget, figures[PRUNED], figures[DENSE])
    assert [verdict.low, verdict.high] == pytest.approx([found.low, found.high], rel=1e-12)
    absolute = BudgetConfig(metric=TG.test, at_least=figures[PRUNED].value)
    verdict = judge(absolute, figures[PRUNED], None)
    assert verdict.outcome == "inconclusive"
    assert (
        "not decided in 12 rounds; those added took 31 s: the time of bench.decide_s is over"
        in verdict.reason
    )
    steady = (300, 305, 298, 302, 301, 299, 303, 300)
    sides = [replace(r, measured_on=MeasuredOn(5)) for r in pair(TG, steady, cpu_samples_ns=())]
    figure = figures_of(*sides)[PRUNED]
    absolute = BudgetConfig(metric=TG.test, at_least=0.9 * (figure.value or 0))
    assert judge(absolute, figure, None).outcome == "pass", "eight rounds decide"


@pytest.mark.parametrize(("cap", "is_apart"), [(0.6, True), (0.62, True), (0.98, False)])
def test_report_and_budget_alike_hold_rows_at_other_clocks_apart(
    pair: Any, cap: float, is_apart: bool
) -> None:
    dense, pruned = pair(TG, WALL * 2, cpu_samples_ns=())
    sides = [
        replace(dense, conditions=(Conditions((0.0,), caps=(1.0,)),)),
        replace(pruned, conditions=(Conditions((0.0,), caps=(cap,)),)),
    ]
    found, figures = compare_records(*sides), figures_of(*sides)
    assert isinstance(found, Comparison)
    assert ("clocks capped" in str(found.reason)) == is_apart
    budget = BudgetConfig(metric=TG.test, relative_to="dense", at_least=0.5)
    verdict = judge(budget, figures[PRUNED], figures[DENSE])
    assert (verdict.outcome == "inconclusive") == ("clocks capped" in verdict.reason) == is_apart
