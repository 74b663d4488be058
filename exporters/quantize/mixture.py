"""Which of several ways to store each tensor, by what rounding it costs, so that a file has a size.

One backward pass over calibration text says what a change of each weight costs (`gradients.collect_weight_moments`),
and rounding some of its rows says what changes. Loss and bytes of all tensors are then a knapsack with one choice a
tensor, which dynamic programming solves.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch

from cfsp.devices import exact
from exporters.quantize.gradients import WeightMoments

GRADIENT_WINDOWS = 4
"""Of the text, from which what changes cost is told."""
ROWS, TABLE_ROWS = 64, 512
"""Of a matrix, and of a table of tokens, that are rounded to see what a type costs it. Of SmolLM2-135M's matrices 64
drawn rows know what all of them cost to 2 to 7 %, by type (root mean square); 128 that matter most knew it to 15 %."""
_ROWS_AT_ONCE = 8192
_STEPS = 2**16
Kind = TypeVar("Kind", bound=Hashable)


@dataclass(frozen=True)
class Option(Generic[Kind]):
    """A way to store a tensor.

    Attributes:
        kind: What it is.
        n_bytes: In the file.
        loss: Nats a token, predicted.
    """

    kind: Kind
    n_bytes: int
    loss: float


def solve(options: Mapping[str, Sequence[Option[Kind]]], left_bytes: int) -> dict[str, Option[Kind]]:
    """One option for each name with the least loss in all that fits; of equal ones the first.

    Sizes are in steps of 1/65536 of what is to be shared out beyond the smallest, rounded up.

    Args:
        options: Name -> what it may have.
        left_bytes: For all, at least what the smallest take.
    """
    least = {name: min(option.n_bytes for option in each) for name, each in options.items()}
    spare = left_bytes - sum(least.values())
    step = max(1, spare // _STEPS)
    best = np.zeros(spare // step + 1)  # least loss of the names so far, by the steps that they may take
    picks = []
    for name, each in options.items():
        steps = [-(-(option.n_bytes - least[name]) // step) for option in each]
        tried = np.full((len(each), len(best)), np.inf)
        for row, cost, option in zip(tried, steps, each, strict=True):
            if cost < len(best):
                row[cost:] = best[: len(best) - cost] + option.loss
        pick = tried.argmin(0)
        best = tried[pick, np.arange(len(best))]
        picks.append((name, pick.astype(np.int8), steps))
    place, chosen = len(best) - 1, {}
    for name, pick, steps in reversed(picks):
        chosen[name] = options[name][pick[place]]
        place -= steps[pick[place]]
    return dict(reversed(chosen.items()))


@dataclass(frozen=True)
class Sample:
    """Some rows of a weight, which know what a change of all of them costs.

    Attributes:
        rows: Which.
        columns: What changes in each column cost beside each other, (columns,) float64.
        weights: The same of each row and of those that it stands for, (n,) float64.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    weights: torch.Tensor

    def cost(self, change: torch.Tensor, step: int = 1) -> torch.Tensor:
        """Nats a token that a change (n, columns) of the rows, or of one in `step` of them, costs, by rows."""
        moments = WeightMoments(self.weights, self.columns, self.columns)
        return moments.cost(change[:, : len(self.columns)], self.weights[::step])


def draw(weight: torch.Tensor, moments: WeightMoments, count: int) -> Sample:
    """Rows of a weight, drawn by about what rounding each costs.

    That is rows_i (1 + u_i / mean(u) + v_i / mean(v)), u_i = sum_j W_ij^2 and v_i = sum_j W_ij^2 columns_j: some types
    lose what is as large as the numbers, some more where inputs are huge.
    """
    columns = moments.columns.float().to(weight.device)
    kinds = torch.stack([torch.ones_like(columns), columns], 1)
    squares = exact(torch.cat([part.float().square() @ kinds for part in torch.split(weight, _ROWS_AT_ONCE)]))
    relative = squares / squares.mean(0).clamp_min(torch.finfo(squares.dtype).tiny)
    rows, factors = drawn_rows(moments.rows * (1 + relative.sum(1).cpu()), count)
    return Sample(rows, moments.columns, moments.rows[rows] * factors)


def of_rows(moments: WeightMoments, rows: slice) -> WeightMoments:
    """The moments of some rows of a weight."""
    return replace(moments, rows=moments.rows[rows])


def drawn_rows(sizes: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that stand for all in a sum over rows which is known of few.

    Rows are drawn at even steps of the running sum of sizes, the largest first: systematic sampling with probability
    proportional to size (Madow 1949). The more a row's part in the sum is as its size says, the less the sum is off.

    Args:
        sizes: Not negative, (n,) float64.
        count: Draws. With no more rows than that each stands for itself.

    Returns:
        Rows, each once, (m,) int64, and the factors with which theirs sum up to all rows' parts, (m,) float64.
    """
    if count >= len(sizes):
        return torch.arange(len(sizes)), torch.ones_like(sizes)
    least = torch.finfo(sizes.dtype).tiny
    total = sizes.sum().clamp_min(least)
    order = sizes.argsort(descending=True, stable=True)
    steps = (torch.arange(count, dtype=sizes.dtype) + 0.5) / count
    draws = torch.searchsorted(sizes[order].cumsum(0) / total, steps).clamp_max(len(sizes) - 1)
    rows, times = torch.unique_consecutive(order[draws], return_counts=True)
    return rows, times / count * total / sizes[rows].clamp_min(least)
