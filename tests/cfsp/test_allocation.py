from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp.errors import InputError
from cfsp.pruning.allocation import (
    ALLOCATIONS,
    BlockEvidence,
    cfsp_keep_ratios,
    integer_widths,
    loss_keep_ratios,
    mixed_keep_ratios,
)
from cfsp.pruning.plan import allocate_widths
from cfsp.pruning.settings import PruneSettings


def evidence(
    importance: list[float], dense: int = 1536, loss_curves: torch.Tensor | None = None
) -> BlockEvidence:
    """Equally wide blocks of given importance."""
    return BlockEvidence(
        torch.tensor(importance, dtype=torch.float64), [dense] * len(importance), loss_curves
    )


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
    ours = cfsp_keep_ratios(evidence(importance), p, a)
    assert ours.tolist() == pytest.approx(paper_keep_ratios(importance, p, a), rel=1e-9, abs=1e-12)
    assert float(ours.mean()) == pytest.approx(1 - p)
    assert float(ours.max()) < 1 + 1e-12


@given(importances, st.floats(0.02, 0.87), st.sampled_from([1, 8, 32]), st.sampled_from([256, 512, 1536]))
def test_budget_is_met_and_widths_are_aligned(
    importance: list[float], p: float, align: int, dense: int
) -> None:
    widths = allocate_widths(evidence(importance, dense), PruneSettings(prune_ratio=p, align=align))
    assert all(0 < w <= dense and w % align == 0 for w in widths)
    assert abs(sum(widths) - (1 - p) * dense * len(importance)) < align


def test_more_important_blocks_keep_more() -> None:
    widths = allocate_widths(evidence([0.5, 0.1, 0.2], 1024), PruneSettings(prune_ratio=0.3, align=32))
    assert widths[0] > widths[2] > widths[1]


def test_nothing_pruned_keeps_odd_widths() -> None:
    assert (
        allocate_widths(evidence([0.1, 0.2, 0.3], 1000), PruneSettings(prune_ratio=0.0, align=256))
        == (1000,) * 3
    )


def test_uniform_width_is_one_width() -> None:
    widths = allocate_widths(
        evidence([0.5, 0.1]), PruneSettings(prune_ratio=0.3, align=256, uniform_width=True)
    )
    assert widths == (1024, 1024)


def test_alignment_that_cannot_meet_the_ratio() -> None:
    with pytest.raises(InputError, match="multiples of 256"):
        allocate_widths(evidence([0.1, 0.2], 512), PruneSettings(prune_ratio=0.9, align=256))


@given(st.lists(st.floats(1, 100), min_size=1, max_size=8))
def test_integer_widths_stay_near_what_was_wanted(wanted: list[float]) -> None:
    widths = integer_widths(wanted, [128] * len(wanted), total=sum(wanted), align=1)
    assert all(abs(w - x) < 1 for w, x in zip(widths, wanted, strict=True))


def convex_curves(n_blocks: int, n_segments: int, seed: int) -> torch.Tensor:
    """Losses that fall ever more slowly with the width, zero at the dense one."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(n_blocks, n_segments, generator=generator, dtype=torch.float64).sort(1).values
    removed = torch.cat([torch.zeros(n_blocks, 1, dtype=torch.float64), costs.cumsum(1)], dim=1)
    return removed.flip(1)


@given(st.integers(0, 1000), st.integers(1, 11))
def test_loss_allocation_has_the_least_predicted_loss(seed: int, n_removed: int) -> None:
    curves = convex_curves(3, 4, seed)
    keep = loss_keep_ratios(evidence([0.1] * 3, 64, curves), n_removed / 12, 1.0)
    kept = (keep * 4).round().long()
    assert (keep * 4).tolist() == pytest.approx(kept.tolist())
    best = min(
        sum(float(curves[block, width]) for block, width in enumerate(widths))
        for widths in itertools.product(range(5), repeat=3)
        if sum(widths) == 12 - n_removed
    )
    assert float(curves.gather(1, kept[:, None]).sum()) == pytest.approx(best)


@given(st.integers(0, 1000), st.floats(0, 0.95))
def test_loss_allocation_meets_the_budget_between_its_points(seed: int, p: float) -> None:
    keep = loss_keep_ratios(evidence([0.1] * 5, 640, convex_curves(5, 8, seed)), p, 1.0)
    assert float(keep.mean()) == pytest.approx(1 - p)
    assert float(keep.min()) >= -1e-9
    assert float(keep.max()) <= 1 + 1e-9


def test_mixed_is_the_mean_of_both() -> None:
    e = evidence([0.1, 0.4, 0.2], 64, convex_curves(3, 4, 0))
    both = cfsp_keep_ratios(e, 0.3, 1.0) + loss_keep_ratios(e, 0.3, 1.0)
    assert mixed_keep_ratios(e, 0.3, 1.0).tolist() == pytest.approx((both / 2).tolist())


@pytest.mark.parametrize("name", [name for name, row in ALLOCATIONS.items() if row.needs_loss])
def test_an_allocation_without_the_curves_it_reads(name: str) -> None:
    with pytest.raises(InputError, match="loss curves"):
        allocate_widths(evidence([0.1, 0.2]), PruneSettings(prune_ratio=0.2, allocation=name))
