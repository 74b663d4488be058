from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp.allocation import allocate_widths, cfsp_keep_ratios, integer_widths
from cfsp.errors import InputError

importances = st.lists(st.floats(0, 1, allow_nan=False), min_size=2, max_size=12)


def paper_keep_ratios(importance: list[float], p: float, a: float) -> list[float]:
    """The paper's allocation, written once more in plain Python."""
    mean = sum(importance) / len(importance)
    s = [1 / (1 + math.exp(-a * 128 * 1024 / 1e4 * (i - mean))) for i in importance]
    s_mean = sum(s) / len(s)
    if (1 - p) * max(s) / s_mean >= 1 and max(s) > s_mean:
        shrink = s_mean * (1 / (1 - p) - 1) / (max(s) - s_mean) / 1.05
        s = [s_mean + (x - s_mean) * shrink for x in s]
    return [(1 - p) * x / s_mean for x in s]


@given(importances, st.floats(0.01, 0.9), st.floats(0, 6))
def test_cfsp_keep_ratios_follow_the_paper(importance: list[float], p: float, a: float) -> None:
    ours = cfsp_keep_ratios(torch.tensor(importance, dtype=torch.float64), p, a)
    assert ours.tolist() == pytest.approx(paper_keep_ratios(importance, p, a), rel=1e-9, abs=1e-12)
    assert float(ours.mean()) == pytest.approx(1 - p)
    assert float(ours.max()) < 1 + 1e-12


@given(importances, st.floats(0.02, 0.9), st.sampled_from([1, 8, 32]), st.sampled_from([256, 512, 1536]))
def test_budget_is_met_and_widths_are_aligned(
    importance: list[float], p: float, align: int, dense: int
) -> None:
    widths = allocate_widths(torch.tensor(importance), [dense] * len(importance), prune_ratio=p, align=align)
    assert all(0 < w <= dense and w % align == 0 for w in widths)
    assert abs(sum(widths) - (1 - p) * dense * len(importance)) < align


def test_more_important_blocks_keep_more() -> None:
    widths = allocate_widths(torch.tensor([0.5, 0.1, 0.2]), [1024] * 3, prune_ratio=0.3, align=32)
    assert widths[0] > widths[2] > widths[1]


def test_nothing_pruned_keeps_odd_widths() -> None:
    assert allocate_widths(torch.rand(3), [1000] * 3, prune_ratio=0.0, align=256) == (1000,) * 3


def test_uniform_width_is_one_width() -> None:
    widths = allocate_widths(
        torch.tensor([0.5, 0.1]), [1536] * 2, prune_ratio=0.3, align=256, uniform_width=True
    )
    assert widths == (1024, 1024)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(InputError, match=r"prune_ratio.*0 <= ratio < 1"):
        allocate_widths(torch.rand(2), [64, 64], prune_ratio=ratio)


def test_alignment_that_cannot_meet_the_ratio() -> None:
    with pytest.raises(InputError, match="multiples of 256"):
        allocate_widths(torch.rand(2), [512, 512], prune_ratio=0.9, align=256)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=8))
def test_integer_widths_stay_near_what_was_wanted(wanted: list[float]) -> None:
    widths = integer_widths(wanted, [128] * len(wanted), total=sum(wanted), align=1)
    assert all(abs(w - x) < 1 for w, x in zip(widths, wanted, strict=True))
