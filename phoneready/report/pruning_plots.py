"""Plots of the plan: which channels are kept, and how many of each block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from cfsp.pruning.plan import PruningPlan
from phoneready.report.plot_style import SOFT, STEPS, Plot, plot_layout, scatter

_BINS = 96
"""Most cells in a row of the heat map."""


def pattern_plot(plan: PruningPlan) -> Plot:
    """Which channels each block keeps, and beside it how much it keeps and how important it is."""
    n, shares = len(plan.blocks), _shares(plan)
    importances = [block.importance for block in plan.blocks]
    cells, hover = zip(*(_kept_bins(plan, index) for index in range(n)), strict=True)
    data = [
        _heat("x", cells, hover) | {"zmin": 0, "zmax": 1},
        _heat("x2", [[s] for s in shares], [[f"block {i}: {s:.1%} kept"] for i, s in enumerate(shares)]),
        _heat(
            "x3",
            [[v] for v in importances],
            [[f"block {i}: importance {v:.4f}"] for i, v in enumerate(importances)],
        ),
    ]
    layout = plot_layout(xaxis="channels", yaxis="block")
    layout["xaxis"] |= {"domain": [0, 0.72], "showticklabels": False, "showgrid": False}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "dtick": max(1, n // 10)}
    strip = {"showgrid": False, "zeroline": False, "tickmode": "array", "tickvals": [0], "fixedrange": True}
    layout["xaxis2"] = strip | {"domain": [0.76, 0.87], "anchor": "y", "ticktext": ["kept"]}
    layout["xaxis3"] = strip | {"domain": [0.89, 1], "anchor": "y", "ticktext": ["imp."]}
    caption = (
        "Each cell is a group of neighbouring channels, in the dense model's order; the darker, the more of them "
        "are kept. The strips on the "
        f"right are each block's kept share ({min(shares):.2f} to {max(shares):.2f}) "
        f"and its coarse importance ({min(importances):.4f} to {max(importances):.4f})."
    )
    height = max(260, 12 * n + 90)
    figure = {"data": data, "layout": layout}
    return Plot("plot-pattern", "What is kept, block by block", caption, "pruning", height, figure)


def allocation_plot(plan: PruningPlan) -> Plot:
    """Kept share of each block over its importance."""
    shares, widths = _shares(plan), plan.dense_shape.ffn_widths
    trace = scatter(
        "blocks",
        [(block.importance, share) for block, share in zip(plan.blocks, shares, strict=True)],
        [
            f"block {i}<br>importance {b.importance:.4f}<br>{b.width} of {d} channels kept ({s:.1%})"
            for i, (b, d, s) in enumerate(zip(plan.blocks, widths, shares, strict=True))
        ],
        marker={
            "size": 11,
            "color": list(range(len(shares))),
            "colorscale": [[i / 3, c] for i, c in enumerate(STEPS[1:])],
            "line": {"width": 1, "color": SOFT},
            "colorbar": {
                "title": {"text": "block", "font": {"size": 12}},
                "thickness": 10,
                "outlinewidth": 0,
                "tickfont": {"color": SOFT},
            },
        },
    )
    layout = plot_layout(xaxis="coarse importance of the block", yaxis="share of channels kept")
    caption = (
        f"Allocation {plan.settings.allocation}: blocks that change the residual stream more keep more channels. "
        f"On average {plan.keep_ratio:.1%} are kept."
    )
    figure = {"data": [trace], "layout": layout}
    return Plot("plot-allocation", "Allocation against importance", caption, "pruning", 340, figure)


def _shares(plan: PruningPlan) -> list[float]:
    """What each block keeps of its channels."""
    return [b.width / dense for b, dense in zip(plan.blocks, plan.dense_shape.ffn_widths, strict=True)]


def _kept_bins(plan: PruningPlan, index: int) -> tuple[list[float], list[str]]:
    """Share of channels that a block keeps in each group of neighbours, and the text of each group."""
    dense, kept = plan.dense_shape.ffn_widths[index], set(plan.blocks[index].kept)
    edges = [round(i * dense / min(_BINS, dense)) for i in range(min(_BINS, dense) + 1)]
    shares, texts = [], []
    for low, high in itertools.pairwise(edges):
        count = sum(channel in kept for channel in range(low, high))
        shares.append(round(count / (high - low), 4))
        texts.append(f"block {index}, channels {low} to {high - 1}<br>{count} of {high - low} kept")
    return shares, texts


def _heat(xaxis: str, values: Sequence[list[float]], hover: Sequence[list[str]]) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "z": list(values),
        "hovertext": list(hover),
        "hoverinfo": "text",
        "xaxis": xaxis,
        "yaxis": "y",
        "showscale": False,
        "colorscale": [[i / (len(STEPS) - 1), colour] for i, colour in enumerate(STEPS)],
        "ygap": 1,
    }
