"""GPTQ: a matrix on the grids of its blocks, column after column."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress

import torch

from cfsp.devices import exact
from cfsp.errors import InputError
from cfsp.pruning.block_by_block import damped_cholesky
from exporters.quantize import Grid

RIDGE = 0.1
"""Relative to the mean of a Gram matrix's diagonal. On SmolLM2-135M, 0.05 to 0.1 lose less than 0.01 and 0.2."""
_EXACT_COLUMNS = 4096
"""Up to so many columns H is factored in float64. Of more it would take most of the time, and the ridge bounds what
float32 loses: of 4096 x 14336 numbers (benchmarks/rounding.py) both lose 0.000956 of the output's mean square."""
_LAZY_COLUMNS = 64
"""What so many columns lost is taken from all later ones in one product."""
_SMALL, _WIDTH = 128, 512
"""Inverting a triangular matrix: rows that are solved for at once, and the width of its products."""


def gptq_codes(weight: torch.Tensor, scales: torch.Tensor, grid: Grid, gram: torch.Tensor) -> torch.Tensor:
    """GPTQ (Frantar et al., arXiv 2210.17323): each column's error is made up for by the columns after it.

    Columns with the largest inputs go first. What column j loses, e_j = (w_j - q_j) / U_jj, is taken from the later
    ones as e_j U_j, where U is the upper Cholesky factor of (H + RIDGE mean(diag H) I)^-1. Blocks keep their scales.

    Args:
        weight: W, (rows, columns) float32, without the offsets of its blocks.
        scales: Of each block, (rows, blocks) float32, none of them 0; the last block may have columns beyond W.
        grid: What a block can hold.
        gram: H = X^T X / T of the layer's inputs, (columns, columns).

    Returns:
        Codes, (columns, rows) float32.

    Raises:
        InputError: H is not finite or cannot be inverted.
    """
    columns = weight.shape[1]
    order = gram.diagonal().argsort(descending=True)
    upper = _upper_factor_of_inverse(gram, order)
    # A column after the other: what belongs to one lies side by side.
    left = weight.float()[:, order].T.contiguous()
    steps = scales.T[order // grid.block_size].contiguous()
    codes, diagonal = torch.empty_like(left), upper.diagonal().tolist()
    for start in range(0, columns, _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, columns)
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            round_to_codes_(torch.div(left[j], steps[j], out=codes[j]), grid)
            lost = torch.addcmul(left[j], codes[j], steps[j], value=-1, out=errors[j - start])
            lost.div_(diagonal[j])
            left[j + 1 : stop].addr_(upper[j, j + 1 : stop], lost, alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    by_column = torch.empty_like(codes)
    by_column[order] = codes
    return by_column


def gptq_blocks(
    weight: torch.Tensor,
    gram: torch.Tensor,
    block_size: int,
    rounded: Callable[[int, torch.Tensor], torch.Tensor],
) -> None:
    """GPTQ block after block, for formats in which a block's numbers cannot be chosen one by one.

    What block B loses, E = (W_B - Q_B) U_BB^-1, is taken from the later columns as E U_B.

    Args:
        weight: W, (rows, columns) float32.
        gram: H = X^T X / T of the layer's inputs, (columns, columns).
        block_size: Neighbouring columns that are rounded at once; it divides their number.
        rounded: (index of a block, what it is to hold (rows, block_size)) -> what it holds.

    Raises:
        InputError: H is not finite or cannot be inverted.
    """
    places = torch.arange(weight.shape[1], device=weight.device).view(-1, block_size)
    blocks = gram.diagonal()[places].sum(1).argsort(descending=True)
    order = places[blocks].flatten()
    upper = _upper_factor_of_inverse(gram, order)
    left = weight.float()[:, order]
    for start, block in zip(range(0, len(order), block_size), blocks.tolist(), strict=True):
        here, later = slice(start, start + block_size), slice(start + block_size, None)
        lost = left[:, here] - rounded(block, left[:, here])
        errors = torch.linalg.solve_triangular(upper[here, here], lost, upper=True, left=False)
        left[:, later] -= errors @ upper[here, later]


def round_to_codes_(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The code nearest to each value, in its place; the lower of two that are as near, where codes are uneven."""
    if grid.codes[-1] - grid.codes[0] == len(grid.codes) - 1:
        return values.round_().clamp_(grid.codes[0], grid.codes[-1])
    nearest = _nearest_codes(grid.codes, values.device)
    last = len(nearest) - 1
    places = values.mul_(2).ceil_().sub_(2 * grid.codes[0]).clamp_(0, last).int()
    return torch.index_select(nearest, 0, places, out=values)


@functools.cache
def _nearest_codes(codes: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The code nearest to (n - 1/2, n] / 2 for each whole n from twice the least to twice the largest code.

    Codes are whole numbers, so that what lies in the middle of two is a multiple of a half.
    """
    values = torch.tensor(codes)
    halves = torch.arange(2 * int(codes[0]), 2 * int(codes[-1]) + 1) / 2
    return values[torch.bucketize(halves, (values[1:] + values[:-1]) / 2)].to(device)


def _upper_factor_of_inverse(gram: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """U, upper triangular float32, with U^T U = (H + RIDGE mean(diag H) I)^-1 for H in an order of its columns.

    H from its last row to its first is L L^T; U is L^-1 turned back. One matrix of H's size is held beside H.
    """
    return invert_lower_(factored(gram, order.flip(0))).float().flip(0, 1)


def factored(gram: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """L with L L^T = H + RIDGE mean(diag H) I; float32 if that is enough.

    Raises:
        InputError: H is not finite or cannot be factored.
    """

    def ordered(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.clone() if order is None else matrix[order[:, None], order]

    if len(gram) > _EXACT_COLUMNS:
        with suppress(InputError):
            return damped_cholesky(ordered(gram.float()), RIDGE)
    return damped_cholesky(ordered(exact(gram)), RIDGE)


def invert_lower_(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix (n, n), in its place.

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]: two halves, and two products with triangular matrices.
    Solving for the columns of I takes two to three times as long, and a second matrix.
    """
    size = len(matrix)
    if size <= _SMALL:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
    half = size // 2
    first, second = invert_lower_(matrix[:half, :half]), invert_lower_(matrix[half:, half:])
    below = matrix[half:, :half]
    reached = torch.empty_like(below)  # B A^-1
    for start in range(0, half, _WIDTH):
        columns = slice(start, start + _WIDTH)
        reached[:, columns] = below[:, start:] @ first[start:, columns]
    for start in range(0, size - half, _WIDTH):
        rows = slice(start, start + _WIDTH)
        stop = min(rows.stop, size - half)
        below[rows] = second[rows, :stop] @ reached[:stop]
    below.neg_()
    return matrix
