"""A matrix brought closer to what it stands for, on the grid of its blocks: GPTQ, then coordinate descent."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F

from cfsp.devices import exact
from cfsp.errors import InputError
from cfsp.precision import exact_sums
from cfsp.pruning.block_by_block import damped_cholesky
from exporters.quantize import Grid, M

RIDGE = 0.1
"""Relative to the mean of a Gram matrix's diagonal. On SmolLM2-135M, 0.05 to 0.1 lose less than 0.01 and 0.2."""
_EXACT_COLUMNS = 4096
"""Up to so many columns H is factored in float64, whose last bits, which depend on the number of threads, choose no
code. Of more it would take most of the time, and float32 loses no more: of 4096 x 14336 numbers
(benchmarks/rounding.py) both lose 0.000956 of the output's mean square."""
_LAZY_COLUMNS, _FEW_COLUMNS = 64, 16
"""What so many columns lost is taken from all later ones in one product, and what a few did from those beside them."""
_SMALL, _WIDTH = 128, 512
"""Inverting a triangular matrix: rows that are solved for at once, and the width of its products."""
_NOTHING, _LEAST = 1e-30, 2.0**-24
"""A scale for which every code stands for nothing, and the least that float16 holds."""
_ROUNDS = 4
"""Of descent. On SmolLM2-135M, one takes a tenth of GPTQ's loss away, four an eighth, and more hardly anything."""
_ROWS, _PRODUCTS = 4096, 2**24
"""How many rows, and products of their blocks, are held at once: rows do not depend on each other."""
_SCALE_RIDGE = 1e-4  # relative to the mean of the diagonal of a row's system of scales
_TOGETHER = 128
"""Columns whose products with all errors are made at once. Inputs of these are rounded if that is faster."""
_TINY = torch.finfo(torch.float32).tiny


def fit(weight: torch.Tensor, stored: M, gram: torch.Tensor) -> M:
    """A matrix as `stored`, which is rounded to the nearest, closer to a weight (rows, columns) for its inputs.

    `gram` is X^T X / T of these, (columns, columns). Raises InputError: it is not finite.
    """
    grid = stored.grid
    scales, offsets = stored.scales_and_offsets()
    scales = scales.to(weight.device)
    # A block of zeros: not every grid has a code for 0.
    scales = torch.where(scales == 0, _LEAST if grid.free_scales else _NOTHING, scales)
    if offsets is not None:
        weight = weight - offsets.to(weight.device).repeat_interleave(grid.block_size, 1)
    codes = gptq_codes(weight, scales, grid, gram)
    codes, scales = refine_codes(weight, codes, scales, grid, gram)
    return stored.with_codes(codes, scales if grid.free_scales else None)


def gptq_codes(weight: torch.Tensor, scales: torch.Tensor, grid: Grid, gram: torch.Tensor) -> torch.Tensor:
    """GPTQ (Frantar et al., arXiv 2210.17323): each column's error is made up for by the columns after it.

    Columns with the largest inputs go first. What column j loses, e_j = (w_j - q_j) / U_jj, is taken from the later
    ones as e_j U_j, where U is the upper Cholesky factor of (H + RIDGE mean(diag H) I)^-1.

    `weight` is W (rows, columns) without offsets, `scales` (rows, blocks) are not 0 and stay, `gram` is H = X^T X / T.
    Returns codes (columns, rows) float32. Raises InputError: H is not finite, or cannot be inverted.
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
        for first in range(start, stop, _FEW_COLUMNS):
            last = min(first + _FEW_COLUMNS, stop)
            for j in range(first, last):
                round_to_codes_(torch.div(left[j], steps[j], out=codes[j]), grid)
                lost = torch.addcmul(left[j], codes[j], steps[j], value=-1, out=errors[j - start])
                lost.div_(diagonal[j])
                left[j + 1 : last].addr_(upper[j, j + 1 : last], lost, alpha=-1)
            few = errors[first - start : last - start]
            left[last:stop].addmm_(upper[first:last, last:stop].T, few, alpha=-1)
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
    """GPTQ block after block: what B loses, E = (W_B - Q_B) U_BB^-1, is taken from the later columns as E U_B.

    `rounded` is (index of a block, what it is to hold (rows, block_size)) -> what it holds.
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
    """The whole code nearest to (n - 1/2, n] / 2 for each whole n from twice the least to twice the largest code."""
    values = torch.tensor(codes)
    halves = torch.arange(2 * int(codes[0]), 2 * int(codes[-1]) + 1) / 2
    return values[torch.bucketize(halves, (values[1:] + values[:-1]) / 2)].to(device)


def _upper_factor_of_inverse(gram: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """U, upper triangular float32, with U^T U = (H + RIDGE mean(diag H) I)^-1 for H in an order of its columns."""
    return invert_lower_(factored(gram, order.flip(0))).float().flip(0, 1)


def factored(gram: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
    """L with L L^T = H + RIDGE mean(diag H) I, float32 if that is enough; InputError if H cannot be factored."""

    def ordered(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.clone() if order is None else matrix[order][:, order]

    if len(gram) > _EXACT_COLUMNS:
        with suppress(InputError):
            return damped_cholesky(ordered(gram.float()), RIDGE)
    return damped_cholesky(ordered(exact(gram)), RIDGE)


def invert_lower_(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix (n, n), in its place, two to three times as fast as solving for I:

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
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


def refine_codes(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, grid: Grid, gram: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower tr((W - Q) (H + RIDGE mean(diag H) I) (W - Q)^T), which GPTQ lowers in one pass, by coordinate descent.

    Free scales of a row become those of least squares. Then one block after another gets its best scale, and each of
    its codes the one that is best beside all others (QuantEase, Behdin et al., arXiv 2309.01885); `_ROUNDS` times.
    Arguments as for `gptq_codes`. Returns codes (columns, rows) and scales (rows, blocks), float32.
    """
    columns, size = weight.shape[1], grid.block_size
    padding = scales.shape[1] * size - columns
    h = gram.new_zeros(columns + padding, columns + padding, dtype=torch.float32)
    h[:columns, :columns] = gram
    diagonal = gram.diagonal().float()
    diagonal = diagonal + (RIDGE * diagonal.mean()).clamp_min(_TINY)
    h.diagonal()[:columns] = diagonal
    inside = gram.new_zeros(len(h) // size, size, size, dtype=torch.float32)  # of every block's own columns
    for block, start in zip(inside, range(0, columns, size), strict=True):
        own = slice(start, min(start + size, columns))
        block[: own.stop - start, : own.stop - start] = gram[own, own]
        block.diagonal()[: own.stop - start] = diagonal[own]
    done = []
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        given = F.pad(weight[rows].float(), (0, padding)).T.contiguous()
        own_codes, own_scales = F.pad(codes[:, rows], (0, 0, 0, padding)), scales[rows].T.contiguous()
        if grid.free_scales:
            _solve_scales_(h, given, own_codes, own_scales, size)
        lost = given - own_codes * own_scales.repeat_interleave(size, 0)
        for _ in range(_ROUNDS):
            _descend_(h, inside, given, own_codes, own_scales, lost, grid, columns)
        done.append((own_codes[:columns], own_scales.T))
    return torch.cat([part for part, _ in done], 1), torch.cat([part for _, part in done])


def _solve_scales_(
    h: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, size: int
) -> None:
    """Move scales (blocks, rows) to those of least squares beside each other; weight and codes are (columns, rows).

    They move by d of A d = r, with A_bc = q_b^T H_bc q_c and r_b = q_b^T (H E)_b; those that cannot be solved stay.
    """
    lost = weight - codes * scales.repeat_interleave(size, 0)
    count, rows = scales.shape
    step = max(1, _PRODUCTS // count**2)
    for start in range(0, rows, step):
        # Side by side, or every product would read from as many places as there are columns.
        some = slice(start, start + step)
        own, off = codes[:, some].contiguous(), lost[:, some].contiguous()
        systems = own.new_empty(own.shape[1], count, count)
        for b in range(count):
            begin = b * size
            columns = slice(begin, begin + size)
            reached = h[begin:, columns] @ own[columns]
            systems[:, b:, b] = _sum_blocks(reached.mul_(own[begin:]), size).T
        with exact_sums(h.device.type):
            reached = h @ off
        residual = _sum_blocks(reached.mul_(own), size)
        diagonal = systems.diagonal(dim1=1, dim2=2)
        diagonal += (_SCALE_RIDGE * diagonal.mean(1, keepdim=True)).clamp_min(_TINY)
        factors, failed = torch.linalg.cholesky_ex(systems)  # reads the lower half
        steps = torch.cholesky_solve(residual.T[..., None], factors)[..., 0]
        moved = scales[:, some] + torch.where(failed[:, None] == 0, steps, 0.0).T
        scales[:, some] = _exact(moved, scales[:, some])


def _descend_(
    h: torch.Tensor,
    inside: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    lost: torch.Tensor,
    grid: Grid,
    columns: int,
) -> None:
    """Choose the scale and the codes of one block after another anew, beside what the others lose by then.

    `h` is damped, `inside` has every block's own columns of it; W, codes and E = W - Q are (columns with padding,
    rows), scales (blocks, rows); `columns` are those without padding.
    """
    size = grid.block_size
    for begin in range(0, columns, _TOGETHER):
        end = min(begin + _TOGETHER, columns)
        with exact_sums(h.device.type):
            together = h[begin:end] @ lost  # H E
        for start in range(begin, end, size):
            block = slice(start, min(start + size, end))
            is_last, n_columns = block.stop == end, block.stop - start
            before = lost[block] if is_last else lost[block].clone()
            scale, own, slopes = (
                scales[start // size],
                codes[block],
                together[start - begin : block.stop - begin],
            )
            own_h = inside[start // size, :n_columns, :n_columns]
            if grid.free_scales:
                # s + q^T (H E) / q^T H q, and H E along with it.
                effects = own_h @ own
                change = (own * slopes).sum(0) / (own * effects).sum(0).clamp_min(_TINY)
                better = _exact(scale + change, scale)
                slopes.addcmul_(effects, better - scale, value=-1)
                scale.copy_(better)
            diagonal = own_h.diagonal()[:, None]
            relative = own_h / diagonal
            # Column j's best number, in units of the scale, is q_j + ((H E)_j / s) / H_jj. What the columns before it
            # hold by then counts: first all columns are as if those before held 0.
            wanted = torch.addmm(slopes.div_(diagonal).div_(scale), relative.tril(-1), own).add_(own)
            for j, effects in enumerate(relative.T):
                chosen = round_to_codes_(wanted[j], grid)
                wanted[j + 1 :].addr_(effects[j + 1 :], chosen, alpha=-1)
            own.copy_(wanted)
            lost[block] = torch.addcmul(weight[block], own, scale, value=-1)
            if not is_last:
                together[block.stop - begin :].addmm_(h[block.stop : end, block], lost[block] - before)


def _exact(scales: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Scales as float16 holds them, and those of before where it holds 0."""
    rounded = scales.half().float()
    return torch.where(rounded == 0, before, rounded)


def _sum_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """(blocks * size, rows) -> (blocks, rows)."""
    return values.view(-1, size, values.shape[1]).sum(1)
