"""Figures held against budgets: noise decides what can be said, and what is written can be read by others."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cfsp.errors import InconclusiveError, InputError, LimitError
from cfsp.records import read_record, write_record
from phoneready.figures.bench_figures import bench_figures
from phoneready.figures.figures import (
    DENSE,
    SHIPPED,
    BudgetConfig,
    BudgetVerdict,
    Figure,
    FigureKey,
    FigureSet,
    Verdicts,
    check_same_model,
    measured_place,
    read_baseline,
)
from phoneready.figures.gate import badge, check_verdicts, judge_all, write_verdicts
from phoneready.figures.gate import judge as judge_one
from phoneready.settings.release import parse_config
from runtime_bench.records.bench_record import BenchRecord, MeasuredOn
from runtime_bench.records.compare import Comparison, Samples, compare_records
from runtime_bench.records.pairs import compare_items
from runtime_bench.workload import Workload

MODEL = '[model]\nreference = "some/model"\n'
SIZE = FigureKey("file_bytes", "Q4_0")
SPEED = FigureKey("tg128", "Q4_0", "local")
KL = FigureKey("kl_mean", "Q4_0", on="chats self")
ACCURACY = FigureKey("accuracy", "Q4_0", on="piqa")


def samples(median: float, spread: float, n: int = 10, seed: int = 0) -> tuple[float, ...]:
    generator = random.Random(seed)
    return tuple(median * (1 + spread * generator.uniform(-1, 1)) for _ in range(n))


def figure(key: FigureKey, value: float | None, role: str = "shipped", **more: object) -> Figure:
    units = {
        "file_bytes": "bytes",
        "tg128": "t/s",
        "kl_mean": "nats",
        "accuracy": "share",
        "mean_accuracy": "share",
    }
    return Figure(key, role, f"{role}-{key.item}", units[key.metric], value, **more)  # type: ignore[arg-type]


def speed(
    values: tuple[float, ...], role: str = "shipped", conditions: dict[str, str] | None = None, **more: Any
) -> Figure:
    timed = Samples(f"{role}-Q4_0", tuple(1 / value for value in values), **more)
    middle = sorted(values)[len(values) // 2]
    return figure(SPEED, middle, role, samples=timed, target="local", conditions=conditions or {})


def figures(*found: Figure, sha256: str | None = "ab") -> FigureSet:
    return FigureSet("some/model", sha256, 0, found)


def budget(**settings: object) -> BudgetConfig:
    return BudgetConfig.model_validate(settings)


def judge(one: BudgetConfig, *found: Figure, baseline: FigureSet | None = None) -> BudgetVerdict:
    (verdict,) = judge_all([one], figures(*found), baseline)
    return verdict


def test_a_size_keeps_to_its_limit_or_not() -> None:
    for limit, outcome in ((100, "pass"), ("100 B", "pass"), (99, "missed"), ("1 KB", "pass")):
        verdict = judge(budget(metric="file_bytes", at_most=limit), figure(SIZE, 100))
        assert (verdict.outcome, verdict.value, verdict.low, verdict.unit) == (outcome, 100, None, "bytes")
        assert (verdict.metric, verdict.subject, verdict.target) == ("file_bytes", "shipped-Q4_0", None)


def test_a_speed_passes_only_with_its_whole_interval() -> None:
    for limit, outcome in ((90, "pass"), (100, "inconclusive"), (115, "missed")):
        verdict = judge(budget(metric="tg128", at_least=limit), speed(samples(100, 0.05)))
        assert verdict.outcome == outcome
        assert (verdict.low or 100) < 100 < (verdict.high or 100)


def test_options_that_change_no_figure_are_not_in_a_targets_name() -> None:
    assert measured_place("ssh:board,retries=5,runner=/r,folder=/tmp/x") == "ssh:board,runner=/r"
    one = budget(metric="tg128", targets=["local,retries=3"], at_least=1)
    assert judge(one, speed(samples(100, 0.05))).outcome == "pass"


def test_memory_is_the_most_of_any_process(make_record: Callable[..., BenchRecord]) -> None:
    def most(*peaks: int, role: str = SHIPPED) -> Figure:
        record = make_record(TG, peak_rss_samples_bytes=peaks, samples_ns=WALL[: len(peaks)])
        found = bench_figures("local", [record], {record.model_filename: (role, "Q4_0")})
        return next(one for one in found if one.key.metric == "peak_rss_bytes")

    ours, dense = most(78, 79, 81), most(100, 104, 102, role=DENSE)
    for limit, outcome in ((81, "pass"), (80, "missed")):
        assert judge(budget(metric="peak_rss_bytes", at_most=limit), ours).outcome == outcome
    for limit, outcome in ((0.78, "pass"), (0.77, "missed")):
        one = budget(metric="peak_rss_bytes", relative_to="dense", at_most=limit)
        assert judge(one, ours, dense).outcome == outcome


def test_few_samples_and_failed_runs_say_nothing() -> None:
    one = budget(metric="tg128", at_least=1)
    few = judge(one, speed((100.0,) * 4))
    assert (few.outcome, few.reason) == ("inconclusive", "shipped-Q4_0 has 4 samples, a verdict needs 5")
    together = judge(one, speed((100.0,) * 8, rounds=(0, 0, 1, 1, 2, 2, 3, 3)))
    assert (together.outcome, together.reason) == (
        "inconclusive",
        "shipped-Q4_0 has 4 processes, a verdict needs 5",
    )
    gone = judge(one, figure(SPEED, None, failure="the board has gone"))
    assert (gone.outcome, gone.reason) == ("inconclusive", "shipped-Q4_0: the board has gone")
    killed = judge(one, figure(SPEED, None, failure="does not fit: killed at the limit of 400 MiB"))
    assert killed.outcome == "missed"
    relative = budget(metric="tg128", at_least=0.97, relative_to="dense")
    dense = figure(SPEED, None, "dense", failure="does not fit: killed at the limit of 400 MiB")
    alone = judge(relative, speed(samples(100, 0.01)), dense)
    assert (alone.outcome, "dense-Q4_0: does not fit" in alone.reason) == ("inconclusive", True)


def test_a_limit_far_from_every_sample_needs_no_more_of_them() -> None:
    few = replace(speed((100.0, 101.0, 99.0, 100.0, 102.0), looks=5), measured_on=MeasuredOn(5))
    assert few.samples is not None
    assert few.samples.too_few(0.95) == "shipped-Q4_0 has 5 samples, a verdict needs 8"
    outcomes = {limit: judge(budget(metric="tg128", at_least=limit), few) for limit in (65, 67, 152, 154)}
    assert [one.outcome for one in outcomes.values()] == ["pass", "inconclusive", "inconclusive", "missed"]
    assert outcomes[67].reason == "shipped-Q4_0 has 5 samples, a verdict needs 8"
    assert "a verdict needs 8, and each is far from the limit" in outcomes[65].reason


def test_what_is_sampled_has_no_difference() -> None:
    for metric, limit in (("load", "at_most"), ("pp512", "at_least"), ("peak_rss_bytes", "at_most")):
        with pytest.raises(ValueError, match=f"difference: {metric} is measured"):
            budget(metric=metric, relative_to="dense", difference=True, **{limit: 1.0})


def test_pairs_decide_what_single_samples_cannot() -> None:
    """A machine whose speed drifts by half, and a file that is 5 % faster in every round."""
    drift = [100 * (1 + 0.5 * i / 19) for i in range(20)]
    dense = speed(tuple(drift), "dense", session="one")
    ours = tuple(1.05 * value for value in drift)
    one = budget(metric="tg128", at_least=1.02, relative_to="dense")
    assert judge(one, speed(ours, session="one"), dense).outcome == "pass"
    apart = judge(one, speed(ours, session="two"), dense)
    assert apart.outcome == "inconclusive"
    assert (apart.unit, apart.limit) == ("x", "at least 1.02 x dense")


def test_accuracies_have_standard_errors() -> None:
    dense = figure(ACCURACY, 0.70, "dense", stderr=0.005)
    one = budget(metric="accuracy", at_least=-0.02, relative_to="dense", difference=True)
    assert judge(one, figure(ACCURACY, 0.70, stderr=0.005), dense).outcome == "pass"
    assert judge(one, figure(ACCURACY, 0.69, stderr=0.005), dense).outcome == "inconclusive"
    assert judge(one, figure(ACCURACY, 0.60, stderr=0.005), dense).outcome == "missed"
    ratio = budget(metric="accuracy", at_least=0.95, relative_to="dense")
    assert judge(ratio, figure(ACCURACY, 0.70, stderr=0.005), dense).outcome == "pass"


def answers(n: int, lost: int = 0, gained: int = 0) -> tuple[str, str]:
    """A model's answers, of which a fifth are wrong, and another's of the same items."""
    before = "1" * (n - n // 5) + "0" * (n // 5)
    return before, "0" * lost + before[lost : n - gained] + "1" * gained


def accuracy(
    right: str, role: str = "shipped", *, recorded: bool = True, key: FigureKey = ACCURACY
) -> Figure:
    share = right.count("1") / len(right)
    error = (share * (1 - share) / (len(right) - 1)) ** 0.5
    return figure(key, share, role, stderr=error, right=(right,) if recorded else ())


def test_answers_to_the_same_items_are_compared_item_by_item() -> None:
    limit = {"metric": "accuracy", "relative_to": "dense"}
    for lost, gained, outcome in ((0, 0, "pass"), (6, 5, "pass"), (8, 0, "inconclusive"), (40, 4, "missed")):
        before, now = answers(500, lost, gained)
        for one in (budget(**limit, at_least=-0.02, difference=True), budget(**limit, at_least=0.975)):
            verdict = judge(one, accuracy(now), accuracy(before, "dense"))
            assert verdict.outcome == outcome
            assert "independent" not in verdict.reason
    # Not every task says which items were answered rightly.
    before, now = answers(500)
    old = accuracy(before, "dense", recorded=False)
    verdict = judge(budget(**limit, at_least=-0.02, difference=True), accuracy(now), old)
    assert verdict.outcome == "inconclusive", "five hundred items cannot tell two points without pairs"
    assert verdict.reason.endswith("; taken as independent: which items were right is not recorded of both")


def test_a_mean_over_tasks_is_compared_item_by_item() -> None:
    key = FigureKey("mean_accuracy", "Q4_0")
    (before, now), (few_before, few_now) = answers(1000, 4, 6), answers(300, 2, 2)
    ours = dataclasses.replace(accuracy(now, key=key), right=(now, few_now), value=0.8)
    dense = dataclasses.replace(accuracy(before, "dense", key=key), right=(before, few_before), value=0.8)
    one = budget(metric="mean_accuracy", relative_to="dense", difference=True, at_least=-0.02)
    verdict = judge(one, ours, dense)
    assert verdict.outcome == "pass"
    assert verdict.low is not None
    assert -0.02 < verdict.low < 0


def test_the_interval_of_paired_answers_covers_the_truth() -> None:
    generator, lost, gained = random.Random(1), 0.08, 0.02
    covered = 0
    for _ in range(100):
        drawn = generator.choices(("11", "10", "01", "00"), (0.6, lost, gained, 0.4 - lost - gained), k=300)
        before, now = ("".join(one[side] for one in drawn) for side in (0, 1))
        found = compare_items([before], [now], difference=True)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= gained - lost <= found.high
    assert 88 <= covered <= 100


def test_a_band_is_an_interval() -> None:
    key = FigureKey("projected_tg", "Q4_0", "pixel-8a")
    found = Figure(key, "shipped", "f", "t/s", 20, kind="projected", low=10, high=40)
    outcomes = [judge(budget(metric="projected_tg", at_least=n), found).outcome for n in (9, 20, 41)]
    assert outcomes == ["pass", "inconclusive", "missed"]


def test_energy_is_as_sure_as_its_meter() -> None:
    key = FigureKey("joules_tg64", "Q4_0", "local")

    def joules(
        value: float, role: str = "shipped", meter: str = "RAPL counter, package", **more: Any
    ) -> Figure:
        times = more.pop("times", (value,) * 6)
        timed = Samples(f"{role}-Q4_0", times, tuple(range(len(times))), **more)
        bounds: dict[str, Any] = {"low": value * 0.98, "high": value * 1.02, "conditions": {"meter": meter}}
        return Figure(key, role, f"{role}-Q4_0", "J", value, target="local", samples=timed, **bounds)

    outcomes = [judge(budget(metric="joules_tg64", at_most=n), joules(1.0)).outcome for n in (0.9, 1.01, 1.1)]
    assert outcomes == ["missed", "inconclusive", "pass"]
    relative = budget(metric="joules_tg64", at_most=0.9, relative_to="dense")
    found = judge(relative, joules(0.8), joules(1.0, "dense"))
    assert (found.outcome, found.value, found.unit) == ("pass", 0.8, "x")
    assert (found.low, found.high) == (pytest.approx(0.784 / 1.02), pytest.approx(0.816 / 0.98))
    assert judge(relative, joules(0.88), joules(1.0, "dense")).outcome == "inconclusive"
    elsewhere = judge(relative, joules(0.8), joules(1.0, "dense", "hwmon power, ina3221 VDD_IN"))
    assert "meter was hwmon power, ina3221 VDD_IN and is RAPL counter, package" in elsewhere.reason
    disturbed = judge(relative, joules(0.8), joules(1.0, "dense", noise="others took the cores"))
    assert (disturbed.outcome, "others took the cores" in disturbed.reason) == ("inconclusive", True)
    # What slows a processor spares energy: it proves nothing of a file.
    slowed = judge(budget(metric="joules_tg64", at_most=2.0), joules(1.0, noise="clocks were capped"))
    assert (slowed.outcome, "clocks were capped" in slowed.reason) == ("inconclusive", True)
    few = judge(budget(metric="joules_tg64", at_most=2.0), joules(1.0, times=(1.0,) * 4))
    assert (few.outcome, "a verdict needs 5" in few.reason) == ("inconclusive", True)
    scattered = joules(1.0, times=(0.8, 1.25, 0.9, 1.1, 1.3, 0.85))
    assert judge(budget(metric="joules_tg64", at_most=1.05), scattered).outcome == "inconclusive"


def test_a_baseline_must_be_of_the_same_model_schema_text_and_machine(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    before = figures(
        figure(KL, 0.10, conditions={"tokens of chats self": "aa"}),
        speed(samples(100, 0.01), conditions={"processor": "this"}),
    )
    write_record(path, before)
    assert read_baseline(path, [KL, SPEED]) == before
    with pytest.raises(InputError, match="has no file_bytes, Q4_0"):
        read_baseline(path, [KL, SIZE])
    check_same_model(before, "elsewhere/the-same", "ab", path)
    with pytest.raises(InputError, match="of another model: some/model"):
        check_same_model(before, "some/model", "cd", path)
    path.write_text(
        path.read_text().replace(f'"schema_version": {FigureSet.SCHEMA_VERSION}', '"schema_version": 99')
    )
    with pytest.raises(InputError, match="unknown schema version"):
        read_baseline(path, [])

    kl = budget(metric="kl_mean", at_most=1.05, relative_to="baseline")
    same = figure(KL, 0.104, conditions={"tokens of chats self": "aa"})
    assert judge(kl, same, baseline=before).outcome == "pass"
    other = dataclasses.replace(same, conditions={"tokens of chats self": "bb"})
    with pytest.raises(InputError, match="tokens of chats self was aa and is bb"):
        judge(kl, other, baseline=before)
    fast = budget(metric="tg128", at_least=0.9, relative_to="baseline")
    here = speed(samples(100, 0.01, seed=1), conditions={"processor": "this"})
    assert judge(fast, here, baseline=before).outcome == "pass"
    elsewhere = judge(fast, dataclasses.replace(here, conditions={"processor": "that"}), baseline=before)
    assert (elsewhere.outcome, "processor was this and is that" in elsewhere.reason) == ("inconclusive", True)


HOSTILE = "<script>alert(1)</script> | `x` [y](http://z) @someone #1 $a$ \x00 & ❤"


def test_verdicts_are_written_for_people_and_machines_and_make_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One verdict of each kind, about a file with a hostile name."""
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    (tmp_path / "step.md").write_text("before\n", encoding="utf-8")
    config = parse_config(
        MODEL + '[[budgets]]\nmetric = "file_bytes"\nat_most = 1\n[[budgets]]\nmetric = "tg128"\nat_least = 100\n'
        '[[budgets]]\nmetric = "kl_mean"\nat_most = 0.2\n',
        where="x",
    )  # fmt: skip
    found = (figure(SIZE, 3 * 2**20), speed(samples(100, 0.05)), figure(KL, 0.1))
    hostile = [dataclasses.replace(one, subject=HOSTILE) for one in found]
    write_verdicts(config.budgets, tmp_path, figures(*hostile))
    verdicts = read_record(Verdicts, tmp_path / "verdicts.json")
    assert [v.outcome for v in verdicts.verdicts] == ["missed", "inconclusive", "pass"]
    assert verdicts.outcome == "missed"
    assert badge(verdicts) == "[MISSED] model: 1 pass, 1 inconclusive, 1 missed"
    with pytest.raises(
        LimitError, match=r"1 of 3 budgets missed: file_bytes of .* is 3\.0 MiB, at most 1 B"
    ) as missed:
        check_verdicts(verdicts.verdicts)
    assert missed.value.exit_code == 1
    rest = dataclasses.replace(verdicts, outcome="inconclusive", verdicts=verdicts.verdicts[1:])
    with pytest.raises(InconclusiveError, match="1 of 2 budgets not decided: tg128 of ") as open_:
        check_verdicts(rest.verdicts)
    check_verdicts(rest.verdicts[1:])
    assert open_.value.exit_code == 3
    assert len(read_record(FigureSet, tmp_path / "figures.json").figures) == 3

    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert {name: suite.get(name) for name in ("tests", "failures", "errors")} == {
        "tests": "3",
        "failures": "1",
        "errors": "1",
    }
    kinds = [{child.tag for child in case} for case in suite]
    assert kinds == [{"failure"}, {"error"}, {"system-out"}]
    assert "<script>" in str(suite[0].get("classname")), "the reader, not the file, has the characters"

    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert (tmp_path / "step.md").read_text(encoding="utf-8") == f"before\n{summary}\n"
    rows = [line for line in summary.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert "missed" in rows[2], "the worst first"
    for row in rows:
        assert row.count("|") == 8
        for character in "<>`[]@$":
            assert character not in row
        assert "://" not in row

    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "step.md"))
    assert write_verdicts((), tmp_path, figures(figure(SIZE, 1))).outcome == "not judged"
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("skipped"), [child.tag for child in suite[0]]) == ("1", ["skipped"])
    assert "the summary is not in" in caplog.text


def test_what_a_busy_machine_measured_passes_and_misses_nothing() -> None:
    noise = "other programs took 57% of the time of its threads"
    slow, fast = samples(4, 0.02), samples(100, 0.02)
    for one in (
        budget(metric="tg128", at_least=50),
        budget(metric="tg128", at_least=0.5, relative_to="dense"),
    ):
        assert judge(one, speed(slow), speed(fast, "dense")).outcome == "missed"
        verdict = judge(one, speed(slow, noise=noise), speed(fast, "dense"))
        assert verdict.outcome == "inconclusive"
        assert verdict.reason == f"too noisy to tell: shipped-Q4_0: {noise}"
    assert judge(budget(metric="tg128", at_least=1), speed(slow, noise=noise)).outcome == "pass"
    relative = budget(metric="tg128", at_least=0.5, relative_to="dense")
    verdict = judge(relative, speed(slow), speed(fast, "dense", noise=noise))
    assert (verdict.outcome, verdict.value) == ("inconclusive", None)
    wild = tuple(4.0 * 10 ** (i % 3) for i in range(10))
    verdict = judge(relative, speed(wild), speed(fast, "dense"))
    assert (verdict.outcome, verdict.value) == ("inconclusive", None)
    assert verdict.reason.startswith(
        "too noisy to tell: the rounds differ too much: one end of the interval is"
    )


def test_nothing_is_compared_with_infinity_and_nothing_equals_nothing() -> None:
    relative = budget(metric="kl_mean", at_most=1.05, relative_to="baseline")
    for before in (float("inf"), float("nan")):
        verdict = judge(relative, figure(KL, 0.1), baseline=figures(figure(KL, before)))
        assert (verdict.outcome, "nothing to be compared with" in verdict.reason) == ("inconclusive", True)
    assert judge(relative, figure(KL, 0.0), baseline=figures(figure(KL, 0.0))).outcome == "pass"
    assert judge(relative, figure(KL, 0.1), baseline=figures(figure(KL, 0.0))).outcome == "inconclusive"


ITEMS = {"dense.gguf": (DENSE, "Q4_0"), "pruned.gguf": (SHIPPED, "Q4_0")}


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
    found = bench_figures("local", records, ITEMS)
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
    verdict = judge_one(budget, figures[SHIPPED], figures[DENSE])
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
        absolute = judge_one(BudgetConfig(metric=TG.test, at_least=1.0), figures[SHIPPED], None)
        assert figures[SHIPPED].value == pruned.median_ts == pytest.approx(absolute.value, rel=1e-12)
    assert (found.verdict, verdict.outcome) == ("faster", "pass")
