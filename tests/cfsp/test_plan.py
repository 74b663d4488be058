"""Fine scores and widths against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import FeedForward
from cfsp.pruning.plan import allocate_widths, cfsp_keep_ratios, channel_scores
from cfsp.pruning.settings import SCORES, PruneSettings


def widths(importance: list[float], dense: int = 1536, **settings: Any) -> tuple[int, ...]:
    """Of equally wide blocks of given importance."""
    asked = PruneSettings(**settings)
    return allocate_widths(torch.tensor(importance, dtype=torch.float64), [dense] * len(importance), asked)


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


@given(importances, st.floats(0.02, 0.87), st.sampled_from([1, 8, 32]), st.sampled_from([256, 512, 1536]))
def test_budget_is_met_and_widths_are_aligned(
    importance: list[float], p: float, align: int, dense: int
) -> None:
    found = widths(importance, dense, prune_ratio=p, align=align)
    assert all(0 < w <= dense and w % align == 0 for w in found)
    assert abs(sum(found) - (1 - p) * dense * len(importance)) < align
    wanted = cfsp_keep_ratios(torch.tensor(importance, dtype=torch.float64), p, 1.0) * dense
    if align == 1:
        assert all(abs(w - x) < 1 for w, x in zip(found, wanted.tolist(), strict=True))


def test_widths_follow_the_settings() -> None:
    first, second, third = widths([0.5, 0.1, 0.2], 1024, prune_ratio=0.3, align=32)
    assert first > third > second, "more important blocks keep more"
    assert widths([0.1, 0.2, 0.3], 1000, prune_ratio=0.0, align=256) == (1000,) * 3
    assert widths([0.5, 0.1], prune_ratio=0.3, align=256, uniform_width=True) == (1024, 1024)
    assert widths([0.5, 0.1], prune_ratio=0.25, align=32, strength=0.0) == (1152, 1152)
    with pytest.raises(InputError, match="multiples of 256"):
        widths([0.1, 0.2], 512, prune_ratio=0.9, align=256)


@pytest.mark.parametrize("name", SCORES)
def test_scores_match_their_definition(name: str) -> None:
    """Channel by channel, on the raw activations."""
    torch.manual_seed(0)
    gate, up, down = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)
    ffn, x = FeedForward(nn.Module(), gate, up, down), torch.randn(50, 10, dtype=torch.float64) + 0.5
    G, U, D = (linear.weight.detach().double() for linear in (gate, up, down))
    expected = []
    for i in range(10):
        norm = float(x[:, i].norm()) / 50**0.5
        relative = sum(float(D[j, i].abs() / D[j].abs().sum()) for j in range(6)) / 6
        for W in (G, U):
            relative += sum(float(W[i, j].abs() / W[:, j].abs().sum()) for j in range(6)) / 6
        expected.append({"activation_norm": norm, "cfsp": relative * norm}[name])
    norms = x.square().mean(0).sqrt()
    assert channel_scores(name, ffn, norms).tolist() == pytest.approx(expected, rel=1e-5)
    norms[3] = math.nan
    with pytest.raises(InputError, match="NaN"):
        channel_scores(name, ffn, norms)
