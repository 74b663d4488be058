"""Summaries of samples."""

from __future__ import annotations

import math
import statistics
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.errors import InputError
from runtime_bench.records import summary
from runtime_bench.records.compare import Samples, judge

NO_CLOCK = settings(deadline=None)
SAMPLES = st.lists(st.integers(10**5, 10**10), min_size=1, max_size=12)


def test_nothing_gives_none_and_never_zero() -> None:
    for function in (summary.mean, summary.median, summary.stdev, summary.spread):
        assert function([]) is None
    assert summary.quantile([], 0.9) is None
    assert summary.stdev([5]) is None
    assert summary.spread([5]) is None


def test_not_finite_gives_none() -> None:
    assert summary.mean([1.0, math.inf]) is None
    assert summary.median([math.nan]) is None


@NO_CLOCK
@given(SAMPLES)
def test_moments_and_quantiles(samples: list[int]) -> None:
    assert summary.median(samples) == pytest.approx(statistics.median(samples))
    assert summary.quantile(samples, 0.0) == min(samples)
    assert summary.quantile(samples, 1.0) == max(samples)
    if len(samples) > 1:
        assert summary.stdev(samples) == pytest.approx(statistics.stdev(samples))


@NO_CLOCK
@given(SAMPLES, st.floats(0.1, 10))
def test_scaling_by_c_gives_the_ratio_c_and_no_width(samples: list[int], c: float) -> None:
    scaled = [c * s for s in samples]
    found = summary.ratio_interval(scaled, samples, paired=True, resamples=200)
    assert found.ratio == pytest.approx(c)
    assert found.low == pytest.approx(c)
    assert found.high == pytest.approx(c)


@NO_CLOCK
@given(st.lists(st.tuples(st.integers(10**5, 10**8), st.integers(10**5, 10**8)), min_size=1, max_size=9))
def test_exchanging_the_sides_inverts_a_paired_interval(pairs: list[tuple[int, int]]) -> None:
    left, right = zip(*pairs, strict=True)
    there = summary.ratio_interval(left, right, paired=True, resamples=200)
    back = summary.ratio_interval(right, left, paired=True, resamples=200)
    assert back.ratio == pytest.approx(1 / there.ratio)
    assert back.low == pytest.approx(1 / there.high)
    assert back.high == pytest.approx(1 / there.low)


@NO_CLOCK
@given(SAMPLES, SAMPLES, st.integers(0, 5))
def test_an_interval_holds_its_ratios_scale_and_repeats_for_a_seed(
    left: list[int], right: list[int], seed: int
) -> None:
    first = summary.ratio_interval(left, right, paired=False, resamples=200, seed=seed)
    assert first == summary.ratio_interval(left, right, paired=False, resamples=200, seed=seed)
    assert min(left) / max(right) * 0.999 <= first.low <= first.high <= max(left) / min(right) * 1.001


@pytest.mark.parametrize("bad", [[], [0.0], [-1.0], [math.nan], [math.inf]])
def test_a_ratio_refuses_what_is_no_time(bad: list[float]) -> None:
    with pytest.raises(InputError, match="positive"):
        summary.ratio_interval(bad, [1.0], paired=False)


def test_pairs_must_match_in_number() -> None:
    with pytest.raises(InputError, match="differ in number"):
        summary.ratio_interval([1.0, 2.0], [1.0], paired=True)


def test_samples_of_one_process_count_as_one_round() -> None:
    # Five processes of four samples; what differs, differs between processes.
    top = [ns for middle in (100, 110, 120, 130, 140) for ns in (middle, middle + 1, middle + 2, middle + 3)]
    bottom = [
        ns for middle in (140, 100, 130, 110, 120) for ns in (middle, middle + 1, middle + 2, middle + 3)
    ]
    rounds = [i // 4 for i in range(20)]
    alone = summary.ratio_interval(top, bottom, paired=True)
    together = summary.ratio_interval(
        top, bottom, paired=True, numerator_rounds=rounds, denominator_rounds=rounds
    )
    assert together.ratio == alone.ratio == 1
    assert together.high / together.low > 1.2 * alone.high / alone.low
    uneven = summary.ratio_interval(
        top[:-3], bottom[:-3], paired=True, numerator_rounds=rounds[:-3], denominator_rounds=rounds[:-3]
    )
    assert uneven.low < uneven.ratio < uneven.high


def test_many_samples_need_little_memory_and_change_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [float(n % 97 + 1) for n in range(3000)]

    def drawn(most: int) -> tuple[summary.RatioInterval, int]:
        monkeypatch.setattr(summary, "_DRAWN_AT_ONCE", most)
        tracemalloc.start()
        try:
            found = summary.ratio_interval(samples, samples[::-1], paired=True, resamples=1500)
            return found, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    (at_once, much), (in_portions, little) = drawn(2**40), drawn(2**18)
    assert at_once.low < 1 < at_once.high
    assert in_portions == at_once
    assert little < much / 10


def test_several_looks_err_no_more_often_than_one() -> None:
    """Two files of one speed, measured on until they differ: every decision is an error. benchmarks/measuring_on.py
    simulates more."""
    generator, looks, trials = np.random.default_rng(3), 5, 120
    wrong = {1: 0, looks: 0}
    for _ in range(trials):
        drift = np.exp(np.cumsum(generator.normal(0, 0.02, 8 * 2 ** (looks - 1))))
        base, new = (drift * np.exp(generator.normal(0, 0.05, len(drift))) for _ in range(2))
        for counted in wrong:
            for look in range(looks):
                n = range(8 * 2**look)
                sides = [
                    Samples("", tuple(one[: len(n)]), tuple(n), session="one", looks=counted)
                    for one in (base, new)
                ]
                found = judge(*sides, resamples=400)
                assert found.shown is not None
                if found.shown.low > 1 or found.shown.high < 1:
                    wrong[counted] += 1
                    break
    assert wrong[looks] <= 0.05 * trials
    assert wrong[1] > 0.08 * trials, "looks that are not surer in proportion err too often"


@pytest.mark.parametrize(("looks", "wanted"), [(1, 5), (5, 8)])
def test_surer_verdicts_need_more_samples(looks: int, wanted: int) -> None:
    sides = [Samples(name, (1.0,) * (wanted - 1), looks=looks) for name in ("base", "new")]
    assert judge(*sides).problem == f"base has {wanted - 1} samples, a verdict needs {wanted}"
    assert judge(*(replace(one, times=(1.0,) * wanted) for one in sides)).problem is None
