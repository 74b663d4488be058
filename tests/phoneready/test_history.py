"""`phoneready history`: changes are found with the run that began them; noise alone is left in peace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from cfsp.errors import InputError, LimitError
from phoneready.figures.bench_figures import bench_figures
from phoneready.figures.figures import DENSE, SHIPPED, BudgetConfig, Figure, FigureKey, FigureSet
from phoneready.figures.gate import differences, judge
from phoneready.history import (
    HISTORY_FILE,
    History,
    HistoryEntry,
    HistoryFigure,
    append_entry,
    check_history,
    entry_of,
    find_entries,
    format_history,
    make_history,
    read_entries,
)
from phoneready.main import main
from phoneready.release.steps import is_measured
from runtime_bench.environment import describe_environment
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.reported import (
    Conditions,
    Contention,
    EngineSettings,
    Joules,
    Metered,
    ProcessEnergy,
)

ENVIRONMENT = replace(describe_environment(), cpus_usable=2)


def bench_record(name: str, samples_ns: Sequence[int], cpu: str = "a processor") -> BenchRecord:
    return BenchRecord(
        kind="measured", target="local", engine="llama.cpp", status="ok", failure=None, session="s",
        workload="tg", test="tg64", model_filename=name, model_type=None, model_size=None,
        model_n_params=None, file_size_bytes=None, file_sha256=None, n_prompt=0, n_gen=64, n_depth=0,
        n_batch=512, n_ubatch=512, n_threads=2, backends=None, cpu_info=cpu,
        test_time=None, warmup=True, samples_per_process=1, environment=ENVIRONMENT,
        samples_ns=tuple(samples_ns), peak_rss_samples_bytes=(200_000_000,) * len(samples_ns),
    )  # fmt: skip


def run(
    number: int, ns: float, rng: np.random.Generator, *, size: int = 80_000_000, dense: float = 1.0,
    cpu: str = "a processor", label: str | None = None,
) -> HistoryEntry:  # fmt: skip
    """A run whose file takes about so many nanoseconds; samples scatter by 1 %."""
    records = [
        bench_record("pruned.gguf", [int(ns * s) for s in np.exp(rng.normal(0, 0.01, 10))], cpu),
        bench_record("dense.gguf", [int(9e8 * dense * s) for s in np.exp(rng.normal(0, 0.01, 10))], cpu),
    ]
    items = {"pruned.gguf": (SHIPPED, "Q4_0"), "dense.gguf": (DENSE, "Q4_0")}
    figures = [Figure(FigureKey("file_bytes", "Q4_0"), SHIPPED, "pruned.gguf", "bytes", size)]
    figures += [f for f in bench_figures("local", records, items) if f.key.metric == "tg64"]
    return entry_of(
        FigureSet("smollm2-135m", "a" * 64, 0, tuple(figures)),
        outcome="pass",
        settings={"prune_ratio": "0.2"},
        versions={"llama-cpp-python": "0.3.36" if number < 15 else "0.3.37"},
        stages={"prune": "same", "bench-local": str(number)},
        label=label or f"v{number}",
        time=datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=number),
    )


def keep(folder: Path, entries: Sequence[HistoryEntry]) -> History:
    """Write each run as a release does, and read them as the command does."""
    for entry in entries:
        append_entry(folder, entry)
    return make_history(find_entries([folder]))


def test_a_change_is_found_with_the_run_that_began_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    slower = [1.15 if n >= 15 else 1.0 for n in range(1, 21)]
    history = keep(tmp_path, [run(n, 7e8 * s, rng, dense=s) for n, s in enumerate(slower, 1)])
    pruned, dense = history.anomalies
    assert (pruned.run, pruned.name, pruned.worse) == (15, "v15", True)
    assert pruned.series == "tg64, Q4_0, local, 2 threads"
    assert pruned.after / pruned.before == pytest.approx(1 / 1.15, rel=0.01)
    assert "llama-cpp-python 0.3.36 -> 0.3.37" in pruned.changed
    assert (pruned.dense_too, dense.role, dense.dense_too) == (True, DENSE, False)
    assert "look at the machine" in pruned.describe()
    assert "since v15 (run 15)" in format_history(history)
    with pytest.raises(LimitError, match="tg64, Q4_0, local, 2 threads since v15"):
        check_history(history, recent=6)
    check_history(history, recent=5)


def test_few_runs_are_compared_by_their_own_samples_and_sizes_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    sizes = (80_000_000, 80_000_000, 84_000_000, 84_100_000)
    history = keep(
        tmp_path, [run(n, 7e8 * (1.1 if n == 4 else 1), rng, size=sizes[n - 1]) for n in range(1, 5)]
    )
    found = [(a.series.split(",")[0], a.run, a.worse) for a in history.anomalies]
    assert found == [("file_bytes", 3, True), ("tg64", 4, True)]


@pytest.mark.parametrize("scatter", [0.0, 0.1])
def test_noise_alone_is_no_change(scatter: float) -> None:
    """12 histories of 12 runs, the machine's speed moving from run to run."""
    rng, alarms = np.random.default_rng(6), 0
    for _ in range(12):
        entries = [run(n, 7e8 * float(np.exp(rng.normal(0, scatter))), rng) for n in range(1, 13)]
        sure = [
            replace(e, figures=tuple(replace(f, error=max(f.error or 0, scatter)) for f in e.figures))
            for e in entries
        ]
        alarms += any(a.series.startswith("tg64") for a in make_history(sure).anomalies)
    assert alarms <= 2


FILES = {"pruned.gguf": (SHIPPED, "Q4_0")}


def figures_of(*records: BenchRecord) -> dict[str, Figure]:
    return {one.key.metric: one for one in bench_figures("local", records, FILES)}


def followed(*figures: Figure) -> tuple[HistoryFigure, ...]:
    found = FigureSet("m", None, 0, figures)
    return entry_of(found, outcome="none", settings={}, versions={}, stages={}).figures


def test_what_a_benchmark_says_becomes_a_figure_or_the_reason_why_not(tmp_path: Path) -> None:
    plain = bench_record("pruned.gguf", [10**9] * 5)
    emulated = figures_of(replace(plain, kind="emulated", target="qemu-aarch64"))["tg64"]
    assert (emulated.value, emulated.samples, emulated.failure) == (None, None, "emulated times say nothing")
    # Speeds at pinned clocks are figures of their own.
    pinned = replace(plain, conditions=tuple(Conditions((0.0,), caps=(cap,)) for cap in (0.6,) * 5))
    before, now = figures_of(plain), figures_of(pinned)
    assert now["tg64"].samples
    assert now["tg64"].samples.noise is None
    assert differences(now["tg64"], before["tg64"]) == "clocks was not stated and is capped at 60%"
    assert not differences(now["peak_rss_bytes"], before["peak_rss_bytes"])
    # What a busy machine measured is not followed.
    busy = figures_of(replace(plain, contention=(Contention(1e4, 0.0),) * 5))
    assert "tg64" in {one.key.metric for one in followed(*before.values())}
    assert "tg64" not in {one.key.metric for one in followed(*busy.values())}
    # What fell back is no figure, and is measured again.
    asked = replace(plain, backends="CPU", engine_settings=EngineSettings(asked_backend="gpu"))
    found = figures_of(asked).values()
    assert {(figure.value, figure.failure) for figure in found} == {(None, "gpu did not compute")}
    failed = {"status": "failed", "failure": "does not fit: killed"}
    unfit = replace(asked, test="pp64", workload="pp", n_prompt=64, n_gen=0, **failed)
    assert figures_of(asked, unfit)["peak_rss_bytes"].failure == "does not fit: killed"
    assert is_measured(plain)
    assert not is_measured(asked)


def test_energy_is_followed_with_what_its_meter_may_be_wrong() -> None:
    plain, told = (
        bench_record("pruned.gguf", [10**9] * 5),
        Metered("RAPL counter", "package", 1.0, Joules(61, 64, 67)),
    )
    sure, short = (
        figures_of(replace(plain, energy=(ProcessEnergy((one,)),) * 5))["joules_tg64"]
        for one in (told, replace(told, joules=Joules(1, 64, 300)))
    )
    assert (sure.value, sure.low, sure.high, sure.unit) == (1.0, 61 / 64, 67 / 64, "J")
    assert sure.conditions["meter"] == "RAPL counter, package"
    assert (short.value, "too short for the meter" in str(short.failure)) == (None, True)
    assert "joules_tg64" not in figures_of(plain)
    (kept,) = followed(sure, short)
    assert kept.error == 0.0, "as its processes scatter, not as its meter may be wrong"


def test_another_processor_begins_another_series(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    entries = [run(n, 7e8 * (2 if n > 6 else 1), rng, cpu="old" if n <= 6 else "new") for n in range(1, 13)]
    history = keep(tmp_path, entries)
    assert not history.anomalies
    speeds = [
        rows for rows in history.series() if (rows[0][1].key.metric, rows[0][1].role) == ("tg64", SHIPPED)
    ]
    assert len(speeds) == 2


def test_the_same_run_is_kept_once_and_folders_are_merged(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    entries = [run(n, 7e8, rng) for n in range(1, 5)]
    assert append_entry(tmp_path / "b", entries[1])
    assert not append_entry(tmp_path / "b", replace(entries[1], time="2026-02-02T00:00:00Z"))
    assert append_entry(tmp_path / "a", entries[0])
    assert append_entry(tmp_path / "a", entries[2])
    assert [e.name for e in find_entries([tmp_path])] == ["v1", "v2", "v3"]
    assert [e.name for e in find_entries([tmp_path / "a", tmp_path / "b" / HISTORY_FILE])] == [
        "v1",
        "v2",
        "v3",
    ]
    assert read_entries(tmp_path / "a" / HISTORY_FILE) == [entries[0], entries[2]]


def test_what_cannot_be_followed_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(10)
    with pytest.raises(InputError, match=f"has no {HISTORY_FILE}"):
        find_entries([tmp_path])
    append_entry(tmp_path, run(1, 7e8, rng))
    path = tmp_path / HISTORY_FILE
    good = path.read_text(encoding="utf-8")
    path.write_text(good + '{"kind": "history-entry", "schema_version": 99}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2 has an unknown schema version"):
        find_entries([tmp_path])
    path.write_text(good + "{", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2 is not valid JSON"):
        append_entry(tmp_path, run(2, 7e8, rng))
    path.write_text(good, encoding="utf-8")
    append_entry(tmp_path, replace(run(2, 7e8, rng), source="other", source_sha256="b" * 64))
    with pytest.raises(InputError, match="runs of different models: other, smollm2-135m"):
        find_entries([tmp_path])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(11)
    keep(tmp_path, [run(n, 7e8 * (1.2 if n >= 9 else 1), rng) for n in range(1, 13)])
    assert main(["history", str(tmp_path), "--json", "--gate"]) == 1
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert found["kind"] == "history"
    assert [a["run"] for a in found["anomalies"]] == [9]
    assert "1 changes for the worse" in output.err
    assert main(["history", str(tmp_path), "--gate", "--set", "recent=1"]) == 0
    assert "12 runs" in capsys.readouterr().out
    assert main(["history", str(tmp_path), "--set", "recent=1"]) == 0
    assert "warning: --set recent has no effect without --gate" in capsys.readouterr().err


ANCHOR = "c" * 64


def beside_an_anchor(ns: float, anchor_ns: float, cpu: str, anchor: str = ANCHOR) -> list[Figure]:
    """Speeds of a file that took turns with an anchor on some machine; both drift alike."""
    drift = (1.0, 1.2, 0.9, 1.5, 1.1, 0.8)
    records = [
        replace(
            bench_record(name, [int(time * d) for d in drift], cpu), anchor_sha256=anchor, is_anchor=is_anchor
        )
        for name, time, is_anchor in (("pruned.gguf", ns, False), ("anchor ref.gguf", anchor_ns, True))
    ]
    found = bench_figures("local", records, {"pruned.gguf": (SHIPPED, "Q4_0")})
    return [figure for figure in found if figure.key.metric == "tg64"]


def test_runs_of_other_machines_are_one_series_by_their_anchor() -> None:
    entries = []
    for number in range(1, 13):
        slow, change = (3.0 if number % 2 else 1.0), (1.25 if number >= 9 else 1.0)
        (one,) = followed(*beside_an_anchor(7e8 * slow * change, 5e8 * slow, f"processor {number % 2}"))
        assert (one.unit, one.value) == ("x anchor", pytest.approx(5 / 7 / change, rel=0.001))
        entries.append(replace(run(number, 7e8, np.random.default_rng(0)), figures=(one,)))
    (anomaly,) = make_history(entries).anomalies
    assert (anomaly.run, anomaly.worse) == (9, True)
    assert anomaly.after / anomaly.before == pytest.approx(1 / 1.25, rel=0.01)


def test_a_baseline_of_another_machine_is_compared_by_the_anchor() -> None:
    (now,) = beside_an_anchor(7e8, 5e8, "fast")
    (before,) = beside_an_anchor(3 * 7e8 * 1.1, 3 * 5e8, "slow")
    budget = BudgetConfig(metric="tg64", at_least=0.95, relative_to="baseline")
    assert before.samples
    before = replace(before, samples=replace(before.samples, session="another"))
    verdict = judge(budget, now, before)
    assert (verdict.outcome, verdict.value) == ("pass", pytest.approx(1.1, rel=0.001))
    (other,) = beside_an_anchor(7e8, 5e8, "fast", anchor="e" * 64)
    verdict = judge(budget, now, other)
    assert verdict.outcome == "inconclusive"
    assert "anchor was eeee" in verdict.reason
