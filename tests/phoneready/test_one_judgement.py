"""The same windows or items get one verdict, whoever is asked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from cfsp.evaluation.loss import Distance
from phoneready.evaluation.evaluation_record import Evaluation, ModelIdentity, TextLoss
from phoneready.evaluation.figures import compare_with_baseline, text_figures
from phoneready.evaluation.measured_file import choose_and_test, standing
from phoneready.evaluation.tables import text_table
from phoneready.figures.figures import TOLERANCES, BudgetConfig, FigureSet
from phoneready.figures.gate import judge_all
from phoneready.history import HistoryEntry, check_history, entry_of, make_history
from phoneready.release.steps import FileLosses
from phoneready.report.report import headline
from runtime_bench.records.compare import (
    BETTER,
    INCONCLUSIVE,
    NO_DIFFERENCE,
    WORSE,
    judge_pairs,
    verdict_of,
)
from runtime_bench.records.pairs import Windows, compare_windows, item_interval, window_interval

BYTES = (100, 110, 90, 120, 105, 95, 130, 80)
EASY = (0.9, 1.3, 0.7, 1.1, 1.0, 1.2, 0.8, 1.4)
"""Bits a byte of the windows: they differ far more than any two models on one of them."""
SHIFTS = {
    BETTER: (0.90, 0.91, 0.9, 0.89, 0.9, 0.91, 0.9, 0.9),
    WORSE: (1.10, 1.11, 1.1, 1.09, 1.1, 1.11, 1.1, 1.1),
    NO_DIFFERENCE: (1.0, 1.01, 0.99, 1.0, 1.0, 1.01, 0.99, 1.0),
    INCONCLUSIVE: (1.3, 0.8, 1.2, 0.9, 1.25, 0.8, 1.3, 0.75),
}
NO_SIDE = {BETTER: "pass", NO_DIFFERENCE: "pass", WORSE: "missed", INCONCLUSIVE: "inconclusive"}
"""Verdict -> what a budget of at most 1.03 times the other says."""


def loss(shifts: Sequence[float] = (1.0,) * 8, against: bool = False) -> TextLoss:
    nats = tuple(math.log(2) * b * n * s for b, n, s in zip(EASY, BYTES, shifts, strict=True))
    dense = loss().nats if against else ()
    n = (63,) * 8
    return TextLoss("text", "t.txt", 64, "f" * 64, BYTES, n, nats, n if against else (), dense)


def evaluation(text: TextLoss) -> Evaluation:
    return Evaluation(ModelIdentity("m"), ModelIdentity("d") if text.against_nats else None, 1, (text,))


def release(text: TextLoss) -> FigureSet:
    return FigureSet("m", None, 0, tuple(text_figures("Q4_0", "m.gguf", "dense", [text])))


@pytest.mark.parametrize("verdict", SHIFTS)
def test_one_text_one_verdict(verdict: str, make_report_input: Callable[..., Any]) -> None:
    base, new = loss(), loss(SHIFTS[verdict], against=True)
    assert judge_pairs(base.bits, new.bits).verdict == verdict
    # A budget, relative to the dense model and to a baseline.
    for other in ("dense", "baseline"):
        budget = BudgetConfig(metric="bits_per_byte", at_most=1.03, relative_to=other)
        (found,) = judge_all([budget], release(new), release(base))
        assert found.outcome == NO_SIDE[verdict], other
    # eval --baseline and eval --against.
    now, before = (evaluation(replace(one, against_n_tokens=(), against_nats=())) for one in (new, base))
    rows = compare_with_baseline(now, before, {**TOLERANCES, "bits_per_byte": 1.03}, where="b.json")
    (row,) = (one for one in rows if one.metric.startswith("bits_per_byte"))
    assert row.outcome == NO_SIDE[verdict]
    assert verdict in text_table(evaluation(new)).markdown()
    # Side by side, in the report and in a search.
    losses = [
        FileLosses(f"Tiny-{role}-Q8_0.gguf", size, (one,), role, "Q8_0")
        for role, size, one in (("dense", 10, base), ("shipped", 10, new))
    ]
    tested = choose_and_test(losses[:1], losses[1:])
    assert tested is not None
    assert tested.found.verdict == verdict
    stands = standing(losses[1], losses).verdict
    assert stands == {WORSE: "dominated", BETTER: "frontier"}.get(verdict, verdict)
    said = headline(replace(make_report_input().figures, losses=tuple(losses)))
    words = {BETTER: "is better than", WORSE: "is worse than", NO_DIFFERENCE: "is as good as"}
    assert words.get(verdict, "inconclusive") in said
    # A history, whose rule is that of eval --baseline.
    runs = [entry(number, one) for number, one in enumerate((base, base, base, new), 1)]
    worse = [a.worse for a in make_history(runs).anomalies if a.series.startswith("bits_per_byte")]
    assert worse == {BETTER: [False], WORSE: [True]}.get(verdict, [])


def entry(number: int, text: TextLoss) -> HistoryEntry:
    made = entry_of(release(text), outcome="pass", settings={}, versions={}, stages={"n": str(number)})
    return replace(made, time=f"2026-01-{number:02}T00:00:00Z", label=f"v{number}")


def test_a_divergence_is_followed_by_its_windows_and_the_gate_turns_green_again() -> None:
    def diverging(mean: float) -> TextLoss:
        distance = Distance(
            tuple(63 * mean * e for e in EASY), (63,) * 8, (60,) * 8, mean, 2 * mean, 3 * mean
        )
        return replace(loss(against=True), distance=distance)

    def worse(*means: float) -> list[int]:
        history = make_history([entry(n, diverging(one)) for n, one in enumerate(means, 1)])
        check_history(history, recent=0)
        return [a.run for a in history.anomalies if a.worse and a.series.startswith("kl_mean")]

    assert worse(0.05, 0.05, 0.05, 0.0518) == [], "eval --baseline allows 0.01"
    assert worse(0.05, 0.05, 0.05, 0.07) == [4]
    runs = [entry(n, diverging(one)) for n, one in enumerate((0.05, 0.05, 0.05, 0.09, 0.05), 1)]
    with pytest.raises(Exception, match="kl_mean"):
        check_history(make_history(runs[:4]), recent=5)
    mended = make_history(runs)
    check_history(mended, recent=5)
    assert [a.over for a in mended.anomalies if a.run == 4 and a.worse] == [True] * 2
    assert "the newest run is as before again" in mended.anomalies[0].describe()


def test_shares_of_all_or_none_have_an_interval() -> None:
    all_right = item_interval(("1" * 20,))
    assert (all_right.value, all_right.high) == (1.0, pytest.approx(1.0))
    assert all_right.low == pytest.approx(0.839, abs=1e-3), "Wilson's, as tables have it"
    two = item_interval(("1" * 20, "0" * 20))
    assert two.value == 0.5
    assert two.low is not None
    assert two.high is not None
    assert 0.5 - two.low == pytest.approx(two.high - 0.5) == pytest.approx((1 - 0.839) / 2, abs=1e-3)


def test_intervals_are_paired_over_windows() -> None:
    """Of windows of one size: Student's t of the differences."""
    a, b = [1.0, 2.0, 1.5, 3.0, 2.2], [1.1, 2.1, 1.65, 3.05, 2.35]
    base, new = (Windows(tuple(100 * one for one in side), (100,) * 5) for side in (a, b))
    found, back = compare_windows(base, new, difference=True), compare_windows(new, base, difference=True)
    assert found is not None
    assert back is not None
    differences = [y - x for x, y in zip(a, b, strict=True)]
    mean, half = statistics.mean(differences), 2.776 * statistics.stdev(differences) / math.sqrt(5)
    assert found == pytest.approx((mean, mean - half, mean + half), rel=5e-3)
    assert (back.value, back.low) == pytest.approx((-found.value, -(found.high or 0)))


def test_one_window_says_nothing_of_noise_and_no_ratio_is_taken_of_nothing() -> None:
    one = Windows((1.0,), (2.0,))
    assert window_interval(one) == (0.5, None, None)
    assert judge_pairs(one, one).verdict == INCONCLUSIVE
    nothing = Windows((0.0, 0.0), (1.0, 1.0))
    assert compare_windows(nothing, nothing) is None
    assert judge_pairs(nothing, nothing, difference=True, threshold=0.01).verdict == NO_DIFFERENCE
    assert judge_pairs(("1111",), ("1111",), higher_is_better=True).verdict == NO_DIFFERENCE
    assert verdict_of(0.99, 1.2, 1.03, 1 / 1.03) == INCONCLUSIVE


def test_no_sentence_is_false_more_often_than_promised(script: Callable[[str], Any]) -> None:
    found = script("benchmarks/null_files").simulate(cases=120, seed=1)
    for sentence, share in found.items():
        assert share <= 0.08, sentence  # 0.025 is promised; 120 cases show no more
    assert {"paid", "did not pay", "no difference"} == set(found)
