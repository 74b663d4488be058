"""Plots of the plan: which channels are kept, and how many of each block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from cfsp.pruning.plan import PruningPlan
from phoneready.report.block_parts import BlockParts, block_parts, loses_attention
from phoneready.report.plot_style import SOFT, STEPS, Plot, plot_layout, scatter

_BINS = 96
"""Most cells in a row of the heat map."""
_STRIP_WIDTH, _STRIP_GAP = 0.1, 0.025
_STRIP_AXIS = MappingProxyType(
    {
        "showgrid": False,
        "zeroline": False,
        "tickmode": "array",
        "tickvals": [0],
        "fixedrange": True,
        "anchor": "y",
    }
)


@dataclass(frozen=True)
class _Strip:
    """A column of cells beside the heat map, one a block.

    Attributes:
        title: Below it.
        values: Shown as shades; None of a block that goes.
        texts: Shown over the cells under the pointer, behind the block's number.
        written: Written into the cells.
    """

    title: str
    values: Sequence[float | None]
    texts: Sequence[str]
    written: Sequence[str] = ()


def pattern_plot(plan: PruningPlan) -> Plot:
    """Which channels each block keeps, or that it goes; beside it how much it keeps, and how important it is."""
    parts = block_parts(plan)
    strips, n = _strips(plan, parts), len(parts)
    cells, hover = zip(*(_kept_bins(plan, index) for index in range(n)), strict=True)
    data = [_heat("x", cells, hover) | {"zmin": 0, "zmax": 1}]
    layout = plot_layout(xaxis="channels", yaxis="block")
    step = _STRIP_WIDTH + _STRIP_GAP
    first = 1 - step * len(strips)
    layout["xaxis"] |= {"domain": [0, first - _STRIP_GAP], "showticklabels": False, "showgrid": False}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "dtick": max(1, n // 10)}
    for number, strip in enumerate(strips):
        left, axis = first + step * number + _STRIP_GAP, number + 2
        data.append(_column(f"x{axis}", strip))
        layout[f"xaxis{axis}"] = _STRIP_AXIS | {
            "domain": [left, left + _STRIP_WIDTH],
            "ticktext": [strip.title],
        }
    layout["annotations"] = [_removed(index, len(cells[index])) for index in sorted(plan.gone)]
    height = max(260, 14 * n + 90)
    figure = {"data": data, "layout": layout}
    return Plot(
        "plot-pattern", "What is kept, block by block", _caption(plan, parts), "pruning", height, figure
    )


def _strips(plan: PruningPlan, parts: Sequence[BlockParts]) -> list[_Strip]:
    """Kept share of the FFN, attention where any goes, importance."""
    stay = [not part.is_gone for part in parts]
    shares = [part.share if stays else None for part, stays in zip(parts, stay, strict=True)]
    kept = [f"{part.width} of {part.dense_width} channels kept ({part.share:.1%})" for part in parts]
    strips = [_Strip("FFN", shares, kept)]
    if loses_attention(plan):
        strips.append(
            _Strip(
                "attn.",
                [part.attention_share if stays else None for part, stays in zip(parts, stay, strict=True)],
                [f"attention: {part.attention}" for part in parts],
                [_in_cell(part) for part in parts],
            )
        )
    importances = [block.importance for block in plan.blocks]
    return [*strips, _Strip("imp.", importances, [f"importance {v:.4f}" for v in importances])]


def _in_cell(part: BlockParts) -> str:
    if part.is_gone:
        return ""
    return "{}/{}".format(*part.groups) if part.attends and part.groups else "" if part.attends else "none"


def _caption(plan: PruningPlan, parts: Sequence[BlockParts]) -> str:
    shares = [part.share for part in parts if not part.is_gone]
    importances = [block.importance for block in plan.blocks]
    sentences = [
        "Each cell is a group of neighbouring FFN channels, in the dense model's order; the darker, the more of them "
        "are kept.",
        "A row without cells is a block that is removed." if plan.gone else "",
        f"The strips on the right are each block's kept share of the FFN ({min(shares):.2f} to {max(shares):.2f}),",
        "how many of its key-value groups its attention keeps (none: the attention is removed),"
        if loses_attention(plan)
        else "",
        f"and its coarse importance ({min(importances):.4f} to {max(importances):.4f}).",
    ]
    return " ".join(filter(None, sentences))


def _removed(index: int, cells: int) -> dict[str, Any]:
    """The word in the row of a block that goes."""
    where = {"x": (cells - 1) / 2, "y": index, "xref": "x", "yref": "y", "showarrow": False}
    return where | {"text": "removed", "font": {"size": 10, "color": SOFT}}


def _column(xaxis: str, strip: _Strip) -> dict[str, Any]:
    hover = [[f"block {index}: {text}"] for index, text in enumerate(strip.texts)]
    trace = _heat(xaxis, [[value] for value in strip.values], hover)
    if strip.written:
        trace |= {
            "text": [[text] for text in strip.written],
            "texttemplate": "%{text}",
            "textfont": {"size": 10},
        }
    # Of equal values plotly shows the middle shade.
    alike = len({value for value in strip.values if value is not None}) == 1
    return trace | ({"zmin": 0, "zmax": 1} if strip.written or alike else {})


def allocation_plot(plan: PruningPlan) -> Plot:
    """Kept share of each block that stays over its importance."""
    pairs = enumerate(zip(plan.blocks, block_parts(plan), strict=True))
    stay = [(index, block, part) for index, (block, part) in pairs if not part.is_gone]
    trace = scatter(
        "blocks",
        [(block.importance, part.share) for _, block, part in stay],
        [
            f"block {index}<br>importance {block.importance:.4f}<br>"
            f"{part.width} of {part.dense_width} channels kept ({part.share:.1%})"
            for index, block, part in stay
        ],
        marker={
            "size": 11,
            "color": [index for index, _, _ in stay],
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


def _kept_bins(plan: PruningPlan, index: int) -> tuple[list[float | None], list[str]]:
    """Share of channels that a block keeps in each group of neighbours, and the text of each group.

    A block that goes has no shares.
    """
    dense, kept = plan.dense_shape.ffn_widths[index], set(plan.blocks[index].kept)
    edges = [round(i * dense / min(_BINS, dense)) for i in range(min(_BINS, dense) + 1)]
    if index in plan.gone:
        bins = len(edges) - 1
        return [None] * bins, [f"block {index}: removed"] * bins
    shares: list[float | None] = []
    texts = []
    for low, high in itertools.pairwise(edges):
        count = sum(channel in kept for channel in range(low, high))
        shares.append(round(count / (high - low), 4))
        texts.append(f"block {index}, channels {low} to {high - 1}<br>{count} of {high - low} kept")
    return shares, texts


def _heat(xaxis: str, values: Sequence[Sequence[float | None]], hover: Sequence[list[str]]) -> dict[str, Any]:
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
